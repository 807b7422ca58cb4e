"""--fsdp: the weights are really divided, and the run is that of plain data parallelism."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from support import finetune_runs, live_runs
from support.live_runs import FSDP, LORA
from support.uneven_runs import EVERY, KINDS, Place, assert_every_gradient, assert_same

# Worst difference of a saved weight between FSDP and one process, over all cases here (torch 2.13, CPU, gloo).
WEIGHT_TOLERANCE = 1e-4  # 2.3e-5 (V-4.6)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("fsdp"))


def compared(place, tag, kinds, *flags, steps=3):
    """Run one process that takes all rows, and two under FSDP that divide them; compare losses and weights."""
    one, _ = place.run(f"{tag}-alone", kinds, *flags, processes=1, batch=2, steps=steps)
    divided = {name: (*own, *FSDP) for name, own in kinds.items()}
    two, reports = place.run(f"{tag}-fsdp", divided, *flags, processes=2, batch=1, steps=steps)
    assert all(batch["whole"] == 0 for report in reports for batch in report)
    assert_every_gradient(reports, processes=2, batches=steps * len(kinds))
    for name in kinds:
        assert_same(two[name], one[name])
        assert_same_weights(place.folder / f"{tag}-fsdp" / name, place.folder / f"{tag}-alone" / name)
    return reports


def assert_same_weights(folder, expected_folder):
    (path,) = [*expected_folder.glob("model.safetensors"), *expected_folder.glob("adapter_model.safetensors")]
    found, expected = load_file(folder / path.name), load_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=WEIGHT_TOLERANCE, rtol=0)


def test_adapters_and_whole_models_on_text_alone_beside_images(place):
    kinds = {"v2_6": KINDS["lora"], "v4_6": KINDS["full"], "xc2_4khd_7b": KINDS["lora"]}
    reports = compared(place, "some", kinds)
    slices = [[batch["slices"] for batch in report[:3]] for report in reports]
    assert slices == [[0, 1, 2], [10, 0, 5]]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_generation(place, kind):
    compared(place, f"every-{kind}", dict.fromkeys(EVERY, KINDS[kind]), steps=4)


@pytest.mark.slow
def test_packed_rows(place):
    kinds = {"v2_6": KINDS["full"], "v2_5": KINDS["lora"], "v4_6": KINDS["lora"], "xc2_7b": KINDS["full"]}
    compared(place, "packed", kinds, "--packing", "true", "--model_max_length", 1024, steps=2)


@pytest.mark.slow
def test_tuning_the_vision_tower_with_an_adapter(place):
    kinds = {
        name: ("--use_lora", "true", "--tune_llm", "false", "--lora_dropout", 0) for name in ("v2_6", "v4_6")
    }
    compared(place, "vision", kinds)


@pytest.mark.slow
def test_a_process_whose_features_are_all_cached_waits_for_no_one(place):
    """The second epoch; the vision tower then runs nowhere, or on one process alone."""
    flags = ("--tune_vision", "false", "--cache_vision_features", place.folder / "features")
    compared(place, "cached", {"v2_6": KINDS["full"], "v4_6": KINDS["full"]}, *flags, steps=8)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    return live_runs.tiny(folder / "model"), live_runs.uneven_rows(folder / "data")


def finish(small, output, *more, steps=4, processes=2, expected=0):
    arguments = live_runs.flags(*small, output, *FSDP, *more, steps=steps)
    run = live_runs.LiveRun(arguments, processes=processes)
    code, printed = run.end()
    assert code == expected, printed[-6000:]
    return printed


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), LORA, ("--bf16", "true")], ids=["full", "lora", "bf16"])
def test_a_checkpoint_continues_the_run(small, tmp_path, flags):
    finish(small, tmp_path / "whole", *flags)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    finish(small, tmp_path / "out", *flags, "--resume_from_checkpoint", "true")
    found, expected = (finetune_runs.losses(tmp_path / name) for name in ("out", "whole"))
    assert [line["loss"] for line in found] == [line["loss"] for line in expected]
    assert [line["grad_norm"] for line in found] == [line["grad_norm"] for line in expected]
    assert_same_weights(tmp_path / "out", tmp_path / "whole")


@pytest.mark.slow
def test_evaluations_and_predictions_between_the_steps(small, tmp_path):
    flags = (
        "--eval_data_path", small[1], "--eval_strategy", "steps", "--eval_steps", 2, "--predict_with_generate", "true",
        "--generation_samples", 3, "--generation_max_new_tokens", 4,
    )  # fmt: skip
    finish(small, tmp_path / "out", *flags)
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [line["step"] for line in history if "eval_loss" in line] == [2, 4]


@pytest.mark.slow
def test_an_adapter_on_4_bit_weights(place):
    """accelerate leaves the quantized weights whole, which is said in the docs; the losses are those without FSDP."""
    qlora = (*KINDS["lora"], "--q_lora", "true")
    one, _ = place.run("q-alone", {"v2_6": qlora}, processes=1, batch=2, steps=2)
    two, reports = place.run("q-fsdp", {"v2_6": (*qlora, *FSDP)}, processes=2, batch=1, steps=2)
    assert_same(two["v2_6"], one["v2_6"])
    assert all(0 < batch["whole"] for report in reports for batch in report)
