"""merge_lora.py: the merged model is the base with its adapter, and other models' adapters are refused."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge_lora
from minicpm_tune.answering.load import InferenceError, ModelChoice, load_for_inference, resolve_base
from minicpm_tune.checkpoints.model_generations import GENERATIONS
from minicpm_tune.checkpoints.weight_files import tensor_names
from minicpm_tune.data.samples import load_processing
from minicpm_tune.files import OutputError
from minicpm_tune.lora.adapter_folders import (
    LEGACY_FILE,
    AdapterError,
    check_base,
    fingerprint_of,
    read_adapter_folder,
    read_fingerprint,
)
from minicpm_tune.lora.loading import load_adapter
from minicpm_tune.lora.merging import MergeError, check_saved, merge
from support import processes
from support.tiny_checkpoints import (
    ALL,
    checkpoint,
    copied,
    edit_json,
    loaded,
    logits,
    merged_checkpoint,
    saved_adapter,
    tuned,
)

# Worst value measured: 2.2e-5 (replicated layers, logits up to 4.7; without them 1e-5), where the adapter
# itself changes logits by 1 to 4.
LOGIT_TOLERANCE = 8e-5


def run(*words):
    return merge_lora.run(merge_lora.parse_flags([str(word) for word in words]))


@pytest.mark.parametrize("name", ALL)
def test_a_merged_checkpoint_gives_the_logits_of_base_and_adapter(name):
    folder, expected = merged_checkpoint(name)
    assert (logits(loaded(folder, name), name) - expected).abs().max() < LOGIT_TOLERANCE
    assert (logits(loaded(checkpoint(name), name), name) - expected).abs().max() > 0.1
    assert sorted(path.name for path in folder.parent.iterdir()) == ["adapter", "merged"]


def test_tensors_that_the_model_does_not_use_survive_byte_for_byte():
    folders = checkpoint("o2_6"), merged_checkpoint("o2_6")[0]
    before, after = (load_file(folder / "model.safetensors") for folder in folders)
    speech = [key for key in before if key.startswith(("apm.", "tts."))]
    assert speech
    assert all(torch.equal(before[key], after[key]) for key in speech)


def test_the_command_writes_bin_files_in_shards(tmp_path):
    expected = logits(saved_adapter(tmp_path / "adapter", "v2_6"), "v2_6")
    script = Path(merge_lora.__file__)
    done = processes.run(
        [
            sys.executable, script, "--model_name_or_path", checkpoint("v2_6"), "--adapter", "adapter",
            "--output_dir", "merged", "--max_shard_size", "400KB", "--safe_serialization", "false",
        ],
        cwd=tmp_path, limit=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "merging it by up to" in done.stderr
    index = json.loads((tmp_path / "merged/pytorch_model.bin.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 1
    assert all((tmp_path / "merged" / file).is_file() for file in files)
    assert not list((tmp_path / "merged").glob("*.safetensors*"))
    found = logits(loaded(tmp_path / "merged", "v2_6"), "v2_6")
    assert (found - expected).abs().max() < LOGIT_TOLERANCE


def test_in_bf16_a_weight_is_rounded_once(tmp_path):
    saved_adapter(tmp_path / "adapter", "v2_6", lora_modules_to_save=["none"])
    run("--adapter", tmp_path / "adapter", "--output_dir", tmp_path / "merged", "--dtype", "bf16")
    base, found = (
        load_file(folder / "model.safetensors") for folder in (checkpoint("v2_6"), tmp_path / "merged")
    )
    added = load_file(tmp_path / "adapter/adapter_model.safetensors")
    key = "llm.model.layers.1.self_attn.q_proj"
    a, b = (added[f"base_model.model.{key}.lora_{side}.weight"] for side in "AB")
    expected = (base[f"{key}.weight"].bfloat16().float() + (64 / 4) * b @ a).bfloat16()
    assert torch.equal(found[f"{key}.weight"], expected)
    assert json.loads((tmp_path / "merged/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_replicated_layer_gets_its_own_adapter(tmp_path):
    model = saved_adapter(
        tmp_path / "adapter", "v2_6", lora_layer_replication="[[0, 2], [0, 2]]", lora_modules_to_save=["none"]
    )
    expected = logits(model, "v2_6")
    run("--adapter", tmp_path / "adapter", "--output_dir", tmp_path / "merged")
    merged = loaded(tmp_path / "merged", "v2_6")
    assert len(merged.llm.model.layers) == 4
    assert (logits(merged, "v2_6") - expected).abs().max() < LOGIT_TOLERANCE


def test_embeddings_that_an_adapter_took_from_the_output_layer_stay_apart(tmp_path):
    """Other tools train shared embeddings without the output layer; the merged model must not share them."""
    saved_adapter(tmp_path / "adapter", "v4_6", lora_modules_to_save=["embed_tokens"])
    edit_json(
        tmp_path / "adapter/adapter_config.json", ensure_weight_tying=False, modules_to_save=["embed_tokens"]
    )
    file = tmp_path / "adapter/adapter_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "lm_head" not in key}, file)
    model, _ = load_for_inference(ModelChoice(adapter=str(tmp_path / "adapter"), device="cpu"))
    expected = logits(model, "v4_6")
    run("--adapter", tmp_path / "adapter", "--output_dir", tmp_path / "merged")
    merged = loaded(tmp_path / "merged", "v4_6")
    assert merged.lm_head.weight is not merged.get_input_embeddings().weight
    assert (logits(merged, "v4_6") - expected).abs().max() < LOGIT_TOLERANCE


def test_an_adapter_of_a_4_bit_run_goes_into_the_original_weights_unless_told(tmp_path, caplog):
    saved_adapter(tmp_path / "adapter", "v2_6", quant_bits=4, lora_modules_to_save=["none"])
    shared = ("--adapter", tmp_path / "adapter", "--output_dir")
    with caplog.at_level("INFO"):
        run(*shared, tmp_path / "original")
    assert "trained on 4 bit weights; merging into full precision" in caplog.text
    run(*shared, tmp_path / "quantized", "--base_precision", "quantized")
    base, original, quantized = (
        load_file(folder / "model.safetensors")
        for folder in (checkpoint("v2_6"), tmp_path / "original", tmp_path / "quantized")
    )
    mlp = "llm.model.layers.0.mlp.up_proj.weight"  # carries no adapter
    assert torch.equal(original[mlp], base[mlp])
    # NF4 has 16 values per block of 64, so a row of 128 has at most 32.
    assert len(quantized[mlp][0].unique()) <= 32
    assert (quantized[mlp] - base[mlp]).abs().max() < 0.2 * base[mlp].abs().max()
    assert quantized.keys() == base.keys()
    assert "quantization_config" not in json.loads((tmp_path / "quantized/config.json").read_text())


def test_the_record_of_a_base_is_in_its_weights_not_in_its_name_or_precision(tmp_path):
    generation = GENERATIONS["v2_6"]
    record = fingerprint_of(checkpoint("v2_6"), generation)
    assert record.has_same_weights(
        fingerprint_of(copied(checkpoint("v2_6"), tmp_path / "renamed"), generation)
    )
    loaded(checkpoint("v2_6"), "v2_6", torch.bfloat16).save_pretrained(tmp_path / "bf16")
    assert record.has_same_weights(fingerprint_of(tmp_path / "bf16", generation))
    loaded(checkpoint("v2_6"), "v2_6", torch.float16, quant_bits=4).save_pretrained(tmp_path / "int4")
    assert fingerprint_of(tmp_path / "int4", generation).linears is None
    assert record.has_same_weights(fingerprint_of(tmp_path / "int4", generation))
    assert not record.has_same_weights(fingerprint_of(checkpoint("v2_6", seed=1), generation))


def test_an_adapter_is_refused_by_another_model_of_the_same_shapes(tmp_path):
    saved_adapter(tmp_path / "adapter", "v2_6")
    other = checkpoint("v2_6", seed=1)
    words = (
        "--model_name_or_path",
        other,
        "--adapter",
        tmp_path / "adapter",
        "--output_dir",
        tmp_path / "merged",
    )
    with pytest.raises(AdapterError, match=r"was not trained on the weights of"):
        run(*words)
    assert not (tmp_path / "merged").exists()
    run(*words, "--allow_other_base", "true")
    assert (tmp_path / "merged/config.json").is_file()


def test_an_adapter_is_refused_by_another_generation(tmp_path):
    saved_adapter(tmp_path / "adapter", "v2_6")
    with pytest.raises(AdapterError, match=r"an adapter of generation v2_6, but .* is MiniCPM-V 4.5"):
        check_base(read_adapter_folder(tmp_path / "adapter"), checkpoint("v4_5"), GENERATIONS["v4_5"])


def test_an_adapter_of_another_tool_is_known_by_its_bases_name_or_weights(tmp_path):
    generation = GENERATIONS["v2_6"]
    saved_adapter(tmp_path / "adapter", "v2_6", complete=False)
    config = tmp_path / "adapter/adapter_config.json"

    def check(name, base=None):
        edit_json(config, base_model_name_or_path=name)
        check_base(read_adapter_folder(tmp_path / "adapter"), base or checkpoint("v2_6"), generation)

    check(str(checkpoint("v2_6")))
    check(str(copied(checkpoint("v2_6"), tmp_path / "renamed")))
    check(f"/gone/{checkpoint('v2_6').name}")
    check(None)
    with pytest.raises(AdapterError, match=r"which is not available to compare with"):
        check("openbmb/MiniCPM-V-2_6")
    with pytest.raises(AdapterError, match=r"whose weights differ from those of"):
        check(str(checkpoint("v2_6", seed=1)))


def test_an_adapter_whose_tensors_do_not_fit_is_refused(tmp_path):
    model = tuned(loaded(checkpoint("v2_6"), "v2_6"), "v2_6", lora_modules_to_save=["none"])
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key.replace("layers.1.", "layers.30."): value for key, value in tensors.items()}, file)
    with pytest.raises(AdapterError, match=r"8 tensors have no place in this model and 8 are missing"):
        load_adapter(loaded(checkpoint("v2_6"), "v2_6"), read_adapter_folder(tmp_path / "adapter"))


def legacy_folder(folder, changed):
    """An adapter as the early official scripts wrote it; ``changed`` are the tensors of their own file."""
    model = saved_adapter(folder, "v2_6", complete=False, lora_modules_to_save=["none"])
    torch.save({f"base_model.model.{key}": value for key, value in changed.items()}, folder / LEGACY_FILE)
    return model


def changed_tensors():
    generator = torch.Generator().manual_seed(3)
    model = loaded(checkpoint("v2_6"), "v2_6")
    return {
        name: value.detach() + 0.05 * torch.randn(value.shape, generator=generator)
        for name, value in model.named_parameters()
        if name.startswith(("vpm.", "resampler.")) or "embed_tokens" in name
    }


def test_an_early_official_adapter_brings_vision_resampler_and_embeddings_along(tmp_path):
    changed = changed_tensors()
    model = legacy_folder(tmp_path / "adapter", changed)
    state = dict(model.base_model.model.named_parameters())
    with torch.no_grad():
        for name, value in changed.items():
            state[name].copy_(value)
    expected = logits(model, "v2_6")
    found, _ = load_for_inference(ModelChoice(adapter=str(tmp_path / "adapter"), device="cpu"))
    assert torch.equal(logits(found, "v2_6"), expected)
    run("--adapter", tmp_path / "adapter", "--output_dir", tmp_path / "merged")
    assert (logits(loaded(tmp_path / "merged", "v2_6"), "v2_6") - expected).abs().max() < LOGIT_TOLERANCE


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"base_model.model.resampler.query": torch.zeros(3, 3)},
            r"resampler.query, of shape \(3, 3\), is of shape",
        ),
        ({"base_model.model.vpm.blocks.0.norm1.weight": torch.zeros(3)}, "is no parameter of this model"),
        ({"epoch": 3}, "holds a dict with values that are not tensors"),
        (os.system, "can't be read as plain tensors"),
    ],
)
def test_a_wrong_early_official_file_is_refused_and_runs_no_code(content, message, tmp_path):
    legacy_folder(tmp_path / "adapter", {})
    torch.save(content, tmp_path / "adapter" / LEGACY_FILE)
    with pytest.raises(AdapterError, match=message):
        load_adapter(loaded(checkpoint("v2_6"), "v2_6"), read_adapter_folder(tmp_path / "adapter"))


def test_a_used_folder_and_a_missing_adapter_are_refused(tmp_path):
    saved_adapter(tmp_path / "adapter", "v2_6")
    with pytest.raises(OutputError, match="the folder exists and is not empty"):
        run("--adapter", tmp_path / "adapter", "--output_dir", tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"found no adapter_config\.json"):
        run("--adapter", tmp_path, "--output_dir", tmp_path / "merged")
    with pytest.raises(InferenceError, match="no model is given"):
        resolve_base(None, None)


def test_one_adapter_is_merged_at_a_time(capsys):
    with pytest.raises(SystemExit):
        merge_lora.parse_flags(["--adapter", "a", "--adapter", "b", "--output_dir", "out"])
    assert "--adapter is given twice; give it once" in capsys.readouterr().err


def test_a_quantized_base_is_not_taken_for_the_original(tmp_path):
    loaded(checkpoint("v2_6"), "v2_6", quant_bits=4).save_pretrained(tmp_path / "int4")
    saved_adapter(tmp_path / "adapter", "v2_6", lora_modules_to_save=["none"])
    words = ("--model_name_or_path", tmp_path / "int4", "--adapter", tmp_path / "adapter", "--output_dir")
    with pytest.raises(MergeError, match=r"stored in 4 bit, expected full precision"):
        run(*words, tmp_path / "merged")
    run(*words, tmp_path / "merged", "--base_precision", "quantized")
    assert tensor_names(tmp_path / "merged") == tensor_names(checkpoint("v2_6"))


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    from minicpm_tune.models.minicpmv.modeling import MiniCPMV

    saved_adapter(tmp_path / "adapter", "v2_6")

    def full(self, folder, **_):
        Path(folder).mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MiniCPMV, "save_pretrained", full)
    with pytest.raises(OutputError, match="No space left on device"):
        run("--adapter", tmp_path / "adapter", "--output_dir", tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_a_merge_that_changes_the_model_is_an_error(monkeypatch):
    model = tuned(loaded(checkpoint("v2_6"), "v2_6"), "v2_6", lora_modules_to_save=["none"])
    layer = model.base_model.model.llm.model.layers[0].self_attn.q_proj
    monkeypatch.setattr(layer, "merge", lambda **_: layer.base_layer.weight.data.mul_(3))
    with pytest.raises(MergeError, match="Merging changed the model"):
        merge(model, load_processing(checkpoint("v2_6")))


def test_missing_tensors_in_a_saved_model_are_noticed(tmp_path):
    model = loaded(checkpoint("v2_6"), "v2_6")
    model.config.name_or_path = ""
    state = {name: value for name, value in model.state_dict().items() if "lm_head" not in name}
    model.save_pretrained(tmp_path / "saved", state_dict=state)
    with pytest.raises(MergeError, match=r"1 tensors of the base model are missing .*llm.lm_head.weight"):
        check_saved(tmp_path / "saved", checkpoint("v2_6"), taller=False)


def test_a_base_with_a_surplus_copy_of_its_tied_output_layer_can_be_merged_into(tmp_path):
    base = copied(checkpoint("v4_6"), tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    expected = logits(saved_adapter(tmp_path / "adapter", "v4_6", base=base), "v4_6")
    run("--adapter", tmp_path / "adapter", "--output_dir", tmp_path / "merged")
    assert "lm_head.weight" not in tensor_names(tmp_path / "merged")
    assert (logits(loaded(tmp_path / "merged", "v4_6"), "v4_6") - expected).abs().max() < LOGIT_TOLERANCE


def test_an_adapter_without_a_record_has_none(tmp_path):
    saved_adapter(tmp_path / "adapter", "v2_6", complete=False)
    assert read_fingerprint(tmp_path / "adapter") is None
