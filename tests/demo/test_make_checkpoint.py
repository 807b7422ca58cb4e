"""Small checkpoints of every generation in the released layout."""

import json

import pytest
import torch

from make_checkpoint import SIZES, make_checkpoint
from minicpm_tune.checkpoints.model_generations import GENERATIONS
from minicpm_tune.checkpoints.weight_files import weight_files
from minicpm_tune.data.samples import load_processing
from minicpm_tune.data.turns import Turn
from minicpm_tune.models.loading import load_model
from minicpm_tune.models.minicpmv.vision import grid_table

SCALE_RESOLUTION = 112  # of the demo's checkpoints, in pixels


@pytest.fixture(scope="module", params=list(GENERATIONS))
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / request.param
    return request.param, make_checkpoint(folder, request.param, size="tiny")


def test_a_small_checkpoint_of_every_generation_loads_as_what_it_is(checkpoint):
    name, folder = checkpoint
    processing = load_processing(folder)
    assert processing.generation.name == name
    model = load_model(folder, dtype=torch.float32)
    assert len(processing.tokenizer) == model.config.get_text_config().vocab_size
    eos = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert processing.tokenizer.convert_tokens_to_ids(processing.generation.turn_end) in eos


def test_its_tokenizer_takes_any_text_and_knows_the_demos_words(checkpoint):
    _, folder = checkpoint
    tokenizer = load_processing(folder).tokenizer
    text = "Grüße, 日本! 12 34"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids).strip() == text
    assert len(tokenizer("The figure is crimson and the ground is ivory.").input_ids) <= 12


def test_its_sample_cuts_large_pictures_and_leaves_small_ones_whole(checkpoint):
    _, folder = checkpoint
    processing = load_processing(folder)
    turns = [Turn("user", ("What is it?",)), Turn("assistant", ("A circle.",))]
    sample = processing.encode(turns, [])
    assert (sample["labels"] != -100).any()
    if processing.generation.slicing in (
        "adaptive",
        "minicpmv46",
    ):  # the others see a square, or always tiles
        rules = processing.rules
        assert len(rules.layout(100, 100).tgt_sizes) == 1
        assert len(rules.layout(224, 224).tgt_sizes) > 2


def test_the_released_files_stand_beside_the_weights(tmp_path):
    make_checkpoint(tmp_path, "v2_6", size="tiny", max_shard_size="1MB")
    names = {path.name for path in tmp_path.iterdir()}
    assert {
        "config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json",
        "tokenizer_config.json", "special_tokens_map.json", "modeling_minicpmv.py",
        "configuration_minicpm.py",
        "model.safetensors.index.json",
    } <= names  # fmt: skip
    assert len(weight_files(tmp_path)) > 1
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["architectures"], config["version"], config["model_type"]) == (
        ["MiniCPMV"],
        2.6,
        "minicpmv",
    )


def test_the_demo_model_has_a_few_million_parameters(tmp_path):
    make_checkpoint(tmp_path, "v2_6", size="demo")
    megabytes = (tmp_path / "model.safetensors").stat().st_size / 1e6
    assert 2 < megabytes / 4 < 6  # fp32: four bytes each


@pytest.mark.parametrize("size", list(SIZES))
def test_the_same_seed_makes_the_same_weights(size, tmp_path):
    first, second = (make_checkpoint(tmp_path / name, size=size, seed=4) for name in ("first", "second"))
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_local_queries_look_at_a_place_each(tmp_path):
    make_checkpoint(tmp_path, "v2_6", size="tiny", local_queries=True)
    resampler = load_model(tmp_path, dtype=torch.float32).resampler
    width = resampler.query.shape[1]
    # Patches of one content, so that places alone decide.
    keys = resampler.ln_kv(torch.linspace(-1, 1, width)).detach() + grid_table(
        [(8, 8)], width, torch.device("cpu")
    )
    query, key = resampler.attn.in_proj_weight.detach().chunk(3)[:2]
    scores = (resampler.ln_q(resampler.query).detach() @ query.T) @ (keys @ key.T).T
    best = scores.argmax(dim=1)
    expected = [(2 * row + 0.5, 2 * column + 0.5) for row in range(4) for column in range(4)]
    for place, (row, column) in zip(best.tolist(), expected, strict=True):
        assert abs(place // 8 - row) <= 1.5
        assert abs(place % 8 - column) <= 1.5
