"""Every part of the model learns with its own rate."""

import pytest
import torch

from minicpm_tune.checkpoints.model_generations import GENERATIONS
from minicpm_tune.lora.build import add_adapter
from minicpm_tune.settings.argument_groups import LearningRates, LoraArguments
from minicpm_tune.training.resilient_trainer import split_by_rate
from support.golden_models import golden_model

ROW = GENERATIONS["v2_6"]


def wrapped_model(**options):
    model, about = golden_model("v2_6", attention="sdpa")
    lora = LoraArguments(lora_r=4, lora_alpha=8, lora_dropout=0.0, **options)
    return add_adapter(model, ROW, lora, vision=False, resampler=True), about


def test_every_parameter_is_in_the_group_of_its_rate():
    model, _ = wrapped_model()
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(
        [{"params": list(trained.values())[:5], "weight_decay": 0.1}, {"params": list(trained.values())[5:]}],
        lr=1e-4,
    )
    rates = LearningRates(1e-4, {"resampler": 1e-5, "embeddings": 1e-6, "vision": None}, lora_ratio=16)
    split_by_rate(optimizer, model, ROW, rates)
    rate_of = {id(value): group["lr"] for group in optimizer.param_groups for value in group["params"]}
    expected = {"resampler": 1e-5, "embeddings": 1e-6, "lora": 1e-4}
    for name, value in trained.items():
        assert rate_of[id(value)] == pytest.approx(
            expected[ROW.part_of(name)] * (16 if "lora_B" in name else 1)
        )
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trained)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.01}
