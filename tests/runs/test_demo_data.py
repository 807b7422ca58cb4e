"""The demo's pictures and its small checkpoints."""

import json
from collections import Counter

import pytest
import torch
from PIL import Image

import draw_pictures
from draw_pictures import BACKGROUNDS, COLORS, QUESTIONS, REQUEST, TASKS, chance, draw_data_set
from make_checkpoint import SIZES, make_checkpoint
from minicpm_tune.checkpoints.model_generations import GENERATIONS
from minicpm_tune.checkpoints.weight_files import weight_files
from minicpm_tune.data.samples import load_processing
from minicpm_tune.data.turns import Turn
from minicpm_tune.models.loading import load_model

SCALE_RESOLUTION = 112  # of the demo's checkpoints, in pixels


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    files = draw_data_set(folder, sizes={"train": 72, "eval": 9, "held_out": 96}, seed=3)
    return folder, {name: json.loads(file.read_text()) for name, file in files.items()}


def test_the_data_set_has_both_tasks_in_three_parts_with_real_pictures(drawn):
    folder, rows = drawn
    assert set(rows) == {f"{task}_{part}" for task in TASKS for part in ("train", "eval")} | {"held_out"}
    kinds = set()
    for row in rows["questions_train"]:
        with Image.open(folder / row["image"]) as picture:
            picture.load()
            kinds.add((picture.format, picture.width * picture.height > SCALE_RESOLUTION**2))
    assert kinds == {("PNG", False), ("PNG", True), ("JPEG", False), ("JPEG", True)}


def test_no_held_out_picture_is_trained_on(drawn):
    folder, rows = drawn
    seen = {(folder / row["image"]).read_bytes() for row in rows["questions_train"]}
    assert not seen & {(folder / row["image"]).read_bytes() for row in rows["held_out"]}


def test_the_same_seed_draws_the_same_pictures(tmp_path):
    sizes = {"train": 3, "eval": 1, "held_out": 1}
    first, second, other = (
        draw_data_set(tmp_path / name, sizes=sizes, seed=seed)
        for name, seed in (("first", 5), ("second", 5), ("other", 6))
    )
    assert first["questions_train"].read_text() == second["questions_train"].read_text()
    assert first["questions_train"].read_text() != other["questions_train"].read_text()
    pictures = [
        (tmp_path / name / "pictures" / "train_00001.png").read_bytes() for name in ("first", "second")
    ]
    assert pictures[0] == pictures[1]


def test_answers_are_dealt_evenly_so_text_alone_has_little_chance(drawn):
    _, rows = drawn
    found = chance(rows["held_out"])
    assert set(found) == {*QUESTIONS.values(), REQUEST}
    assert found[QUESTIONS["color"]] == pytest.approx(1 / len(COLORS))
    assert found[QUESTIONS["background"]] == pytest.approx(1 / len(BACKGROUNDS))
    assert found[REQUEST] == pytest.approx(1 / (len(COLORS) * len(BACKGROUNDS)))


def test_each_question_comes_last_in_half_of_the_rows(drawn):
    _, rows = drawn
    last = Counter(row["conversations"][-2]["content"] for row in rows["questions_train"])
    assert last == {question: 36 for question in QUESTIONS.values()}


def test_the_second_task_uses_words_that_the_first_never_did(drawn):
    _, rows = drawn
    first, second = (
        {
            word
            for row in rows[f"{task}_train"]
            for turn in row["conversations"][1::2]
            for word in turn["content"].split()
        }
        for task in TASKS
    )
    assert not first & second


def test_chance_is_the_best_answer_to_each_question():
    rows = [
        {"conversations": [{"content": f"<image>\n{question}"}, {"content": answer}]}
        for question, answer in [("a?", "1"), ("a?", "1"), ("a?", "2"), ("b?", "3"), ("b?", "4")]
    ]
    assert chance(rows) == {"a?": 2 / 3, "b?": 1 / 2}


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


def test_the_sentences_are_those_of_the_rows(drawn):
    _, rows = drawn
    spoken = {turn["content"] for part in rows.values() for row in part for turn in row["conversations"]}
    assert spoken <= set(draw_pictures.sentences())
