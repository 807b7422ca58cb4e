"""The demo's pictures and questions."""

import json
from collections import Counter

import pytest
from PIL import Image

import draw_pictures
from draw_pictures import BACKGROUNDS, COLORS, QUESTIONS, REQUEST, TASKS, chance, draw_data_set

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


def test_the_sentences_are_those_of_the_rows(drawn):
    _, rows = drawn
    spoken = {turn["content"] for part in rows.values() for row in part for turn in row["conversations"]}
    assert spoken <= set(draw_pictures.sentences())
