"""MiniCPM-V 4.7-35B-A3B in real runs: experts divided among processes, with their balance loss, tuned or adapted."""

import json

import pytest
import torch
from safetensors.torch import load_file

from support.live_runs import FSDP, LORA, STAGES
from support.uneven_runs import Place, assert_every_gradient, assert_same

pytestmark = pytest.mark.slow
MOE = "v4_7_moe"
KINDS = {"full": (), "experts": (*LORA, "--lora_dropout", 0, "--lora_experts", "true")}
DIVISIONS = {"zero2": STAGES["zero2"], "zero3": STAGES["zero3"], "fsdp": FSDP}
WEIGHT_TOLERANCE = 1e-4  # 6.2e-6


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("experts"), only=(MOE,))
    path = place.folder / MOE / "config.json"
    config = json.loads(path.read_text())
    config["text_config"] |= {"output_router_logits": True, "router_aux_loss_coef": 0.1}
    path.write_text(json.dumps(config))
    return place


@pytest.mark.parametrize("kind", KINDS)
def test_experts_divided_among_processes_give_the_run_of_one(place, kind):
    one, _ = place.run(f"{kind}-alone", {MOE: KINDS[kind]}, processes=1, batch=2, steps=3)
    expected = saved(place.folder / f"{kind}-alone" / MOE)
    for name, division in DIVISIONS.items():
        tag = f"{kind}-{name}"
        two, reports = place.run(tag, {MOE: (*KINDS[kind], *division)}, processes=2, batch=1, steps=3)
        assert_every_gradient(reports, processes=2, batches=3)
        assert_same(two[MOE], one[MOE])
        found = saved(place.folder / tag / MOE)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, atol=WEIGHT_TOLERANCE, rtol=0)


def saved(folder):
    (path,) = [*folder.glob("model.safetensors"), *folder.glob("adapter_model.safetensors")]
    return load_file(path)


def test_packing_changes_neither_loss_nor_balance(place):
    flags = ("--model_max_length", 4096, "--per_device_train_batch_size")
    found = [
        place.run(tag, {MOE: (*more, *flags, size)}, processes=1, batch=1, steps=1)[0][MOE]
        for tag, more, size in (("rows", (), 7), ("packed", ("--packing", "true"), 1))
    ]
    assert_same(found[1], found[0])
