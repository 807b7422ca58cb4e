"""The paper calculation of cost and scaling: its parts, and that the page shows what it says."""

import sys

import pytest
import torch

from how_far import GPUS_PER_NODE, Machine, lora_parameters, sent_bytes, step_seconds
from make_checkpoint import make_checkpoint
from minicpm_tune.checkpoints.model_generations import GENERATIONS
from minicpm_tune.lora.build import add_adapter
from minicpm_tune.models.loading import load_model
from minicpm_tune.settings.argument_groups import LoraArguments
from step_flops import shape_of
from support import processes
from support.paths import BENCHMARKS, ROOT


@pytest.mark.parametrize("generation", ["v2_6", "v4_5"])
def test_adapters_are_counted_as_they_are(tmp_path, generation):
    row = GENERATIONS[generation]
    model = load_model(make_checkpoint(tmp_path, generation, size="tiny"), dtype=torch.float32)
    shape = shape_of(model)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    lora = LoraArguments(lora_r=8, lora_modules_to_save=[])
    wrapped = add_adapter(model, row, lora, vision=False, resampler=False)
    trained = sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)
    assert lora_parameters(shape, 8) == trained


def test_bytes_sent_are_those_of_the_formulas():
    sizes = {"parameters": 1000, "trained": 10, "gpus": 4, "micro_batches": 2}
    assert sent_bytes("DDP", **sizes) == 8 * 10 * 3 / 4
    assert sent_bytes("ZeRO-2", **sizes) == (2 * 2 + 2) * 10 * 3 / 4
    assert sent_bytes("ZeRO-3", **sizes) == (4 * 1000 + 2 * 10) * 2 * 3 / 4
    assert sent_bytes("ZeRO-3", **{**sizes, "gpus": 1}) == 0


def test_the_slowest_link_decides_and_overlap_hides_the_shorter_part():
    machine = Machine(flops=1.0, inside=300.0, link=50.0)
    assert machine.bandwidth(GPUS_PER_NODE) == 300
    assert machine.bandwidth(GPUS_PER_NODE + 1) == 50
    assert step_seconds(3, 2) == (3, 5)


def test_the_page_shows_what_it_prints():
    done = processes.run([sys.executable, BENCHMARKS / "how_far.py"], limit=100)
    assert done.returncode == 0, done.stderr
    tables = [line for line in done.stdout.splitlines() if line.strip()]
    page = (ROOT / "docs" / "speed-and-scale.md").read_text(encoding="utf-8")
    missing = [line for line in tables if line not in page]
    assert len(tables) > 20
    assert not missing
