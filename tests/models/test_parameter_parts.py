"""Which parameters train, by part of the model."""

import pytest
import torch

from minicpm_tune.checkpoints.model_generations import GENERATIONS
from minicpm_tune.models.parameter_parts import count_parts, freeze, raise_precision_of_trained
from support.golden_models import SIX, golden_model


def trained_parts(model, generation):
    return {
        generation.part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad
    }


@pytest.mark.parametrize("generation", SIX)
@pytest.mark.parametrize(
    ("switches", "expected"),
    [
        ({"vision": True, "resampler": True, "llm": True}, {"vision", "resampler", "embeddings", "llm"}),
        ({"vision": False, "resampler": True, "llm": False}, {"resampler"}),
        ({"vision": True, "resampler": False, "llm": False}, {"vision"}),
    ],
)
def test_freezing_leaves_exactly_the_chosen_parts_to_train(generation, switches, expected):
    model, _ = golden_model(generation)
    freeze(model, GENERATIONS[generation], **switches)
    assert trained_parts(model, GENERATIONS[generation]) == expected
    if generation == "v2":
        assert not model.resampler.pos_embed.requires_grad


def test_trained_parameters_are_held_in_fp32_and_frozen_ones_left_alone():
    model, _ = golden_model("v2_6", dtype=torch.bfloat16)
    freeze(model, GENERATIONS["v2_6"], vision=False, resampler=True, llm=False)
    raise_precision_of_trained(model)
    counts = count_parts(model, GENERATIONS["v2_6"])
    assert counts["resampler"].dtypes == ("float32",)
    assert counts["llm"].dtypes == ("bfloat16",)
