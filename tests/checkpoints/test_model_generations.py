"""The generation is read from config.json, and a contradicting --llm_type is refused."""

import json

import pytest

from minicpm_tune.checkpoints.model_generations import (
    GENERATIONS,
    UnknownCheckpointError,
    check_llm_type,
    detect_generation,
)
from support.paths import GOLDENS


def config_of(generation):
    return json.loads((GOLDENS / generation / "config.json").read_text())


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_released_config_tells_the_generation(generation):
    assert detect_generation(config_of(generation)).name == generation


@pytest.mark.parametrize("generation", ["v2_5", "v2_6", "v4", "v4_5"])
def test_without_a_version_the_rest_of_the_config_tells_it(generation):
    config = config_of(generation)
    del config["version"]
    assert detect_generation(config).name == generation


def test_the_name_of_the_folder_tells_nothing():
    config = config_of("v2_6") | {"_name_or_path": "openbmb/MiniCPM-V-4_5"}
    assert detect_generation(config).name == "v2_6"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', expected 'minicpmv'"),
        ({}, "model_type is 'missing'"),
        ({"model_type": "minicpmv", "version": 9}, "version is 9, expected one of 2.5, 2.6"),
        ({"model_type": "minicpmv"}, "nothing in it tells the generation"),
    ],
)
def test_another_checkpoint_is_refused(config, message):
    with pytest.raises(UnknownCheckpointError, match=message):
        detect_generation(config)


@pytest.mark.parametrize(
    ("generation", "llm_type"),
    [
        ("v2", "minicpm"),
        ("v2_5", "llama3"),
        ("v2_6", "qwen"),
        ("v2_6", "qwen2"),
        ("v4", "llama"),
        ("v4", "auto"),
    ],
)
def test_the_documented_llm_type_is_accepted(generation, llm_type):
    check_llm_type(GENERATIONS[generation], llm_type)


@pytest.mark.parametrize(
    ("generation", "llm_type", "right"), [("v2_6", "minicpm", "qwen"), ("v2", "llama3", "minicpm")]
)
def test_a_contradicting_llm_type_is_an_error_that_says_which_is_right(generation, llm_type, right):
    with pytest.raises(ValueError, match=f"expected --llm_type {right}"):
        check_llm_type(GENERATIONS[generation], llm_type)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_row_names_its_parts(generation):
    assert set(GENERATIONS[generation].modules) == {"vision", "resampler", "embeddings", "llm"}


def test_every_folder_of_goldens_is_of_a_generation():
    assert {path.parent.name for path in GOLDENS.glob("*/config.json")} == set(GENERATIONS)
