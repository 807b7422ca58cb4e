"""A model tuned in full is a base like any other: the released tensors, and a merge that takes no traces of its run."""

import json

import pytest

import merge_lora
from minicpm_tune.checkpoints.weight_files import tensor_names
from support import finetune_runs
from support.tiny_checkpoints import checkpoint, loaded, logits, saved_adapter

LOGIT_TOLERANCE = 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("v4_6", ("--deepspeed", "ds_config_zero2.json")),
        ("v4_6", ("--deepspeed", "ds_config_zero3.json")),
        ("v2_6", ()),
    ],
    ids=["v4_6-zero2", "v4_6-zero3", "v2_6-ddp"],
)
def test_an_adapter_trained_on_a_tuned_base_merges_into_files_of_the_model_alone(name, flags, tmp_path):
    data = finetune_runs.write_data(tmp_path / "data", rows=4, text_only=())
    finetune_runs.train(
        tmp_path, "--use_lora", "false", "--tune_vision", "true", "--tune_llm", "true", *flags,
        "--eval_data_path", data, "--do_eval", "true",
        model=checkpoint(name), data=data, steps=1, batch=2, processes=2,
    )  # fmt: skip
    tuned = tmp_path / "out"
    assert {"run.json", "trainer_state.json", "all_results.json", "eval_results.json"} <= {
        path.name for path in tuned.iterdir()
    }
    assert tensor_names(tuned) == tensor_names(checkpoint(name))

    expected = logits(saved_adapter(tmp_path / "adapter", name, base=tuned), name)
    words = ["--adapter", tmp_path / "adapter", "--output_dir", tmp_path / "merged"]
    merge_lora.run(merge_lora.parse_flags([str(word) for word in words]))
    assert (logits(loaded(tmp_path / "merged", name), name) - expected).abs().max() < LOGIT_TOLERANCE
    model_files = {path.name for path in checkpoint(name).iterdir()}
    assert {path.name for path in (tmp_path / "merged").iterdir()} == model_files
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tuned)
