"""Rows of every form as questions: literal texts, thoughts, system texts, videos with a frame rate of their own."""

import json

import pytest

from dataset import SupervisedDataset
from minicpm_tune.answering.prediction import PredictionRows
from minicpm_tune.errors import DataError
from support.golden_checkpoints import processing
from support.rows import SMALL, chat


def questions(tmp_path, row, name="v2_6"):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return PredictionRows(SupervisedDataset(path, processing(name)))


def prompt(found, name="v2_6"):
    return processing(name).tokenizer.decode(found.prompt["input_ids"]).replace("<unk>", "")


def test_a_literal_text_and_an_image_in_one_question(tmp_path):
    row = {"image": SMALL, "messages": chat(r"<image>What does \<video> do?", "It embeds a film.")}
    rows = questions(tmp_path, row)
    rows.check([0])
    assert prompt(rows[0]).endswith("<image></image>What does <video> do?<|im_end|>\n<|im_start|>assistant\n")
    assert rows[0].text == "What does <video> do?"
    assert len(rows[0].prompt["tgt_sizes"]) == 1


def test_a_system_text_beside_the_turns_reaches_the_prompt(tmp_path):
    row = {"system": "Be brief.", "messages": chat("Hi", "Hello.")}
    assert prompt(questions(tmp_path, row)[0]).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")


def test_thoughts_of_the_answer_are_no_part_of_the_question(tmp_path):
    answer = {"role": "assistant", "content": "Two.", "reasoning_content": "One and one."}
    found = questions(tmp_path, {"messages": [*chat("How many?"), answer]}, "v4_5")[0]
    assert "One and one." not in prompt(found, "v4_5")
    assert found.answer == "Two."


def test_half_an_emoji_names_the_row(tmp_path):
    rows = questions(tmp_path, {"messages": chat("so \ud83d", "x")})
    with pytest.raises(DataError, match=r"row 0: the row has \\ud83d, which is half of a character"):
        rows[0]
    with pytest.raises(DataError, match="1 of 1 rows can't be used"):
        rows.check([0])


def test_boxes_of_objects_stand_in_question_and_answer_as_text(tmp_path):
    row = {
        "image": SMALL,
        "messages": chat("Find <ref-object> beside <bbox>.", "<bbox>"),
        "objects": {"ref": ["it"], "bbox": [[0, 0, 0.5, 1], [0.5, 0, 1, 1]], "bbox_type": "norm1"},
    }
    rows = questions(tmp_path, row)
    assert rows.check([0]) == [0]
    assert "Find <ref>it</ref> beside <box>0 0 500 1000</box>." in prompt(rows[0])
    assert rows[0].answer == "<box>500 0 1000 1000</box>"


def test_a_box_outside_its_picture_is_found_before_the_model_is_loaded(tmp_path):
    row = {"image": SMALL, "messages": chat("Where?", "<bbox>"), "objects": {"bbox": [[0, 0, 9999, 1]]}}
    with pytest.raises(DataError, match=r"row 0: objects\.bbox 0 is \[0, 0, 9999, 1\], expected 0 to"):
        questions(tmp_path, row).check([0])


def test_a_table_with_questions_alone_is_answered(tmp_path):
    (tmp_path / "test.csv").write_text("prompt,picture\nHow many?,\nWhat?,\n")
    columns = '{"prompt": "user", "picture": "image"}'
    rows = PredictionRows(SupervisedDataset(tmp_path / "test.csv", processing("v2_6", columns=columns)))
    assert rows.check([0, 1]) == [0, 1]
    assert [(rows[index].text, rows[index].answer) for index in (0, 1)] == [
        ("How many?", None),
        ("What?", None),
    ]
