"""Names and boxes: real tokens where the model has them, plain text elsewhere; read back and put on the picture."""

import json

import pytest
from PIL import Image

from dataset import SupervisedDataset
from minicpm_tune.checkpoints.model_generations import GENERATIONS
from minicpm_tune.data.grounding import intersection_over_union, read_boxes
from minicpm_tune.data.row_check import check_rows
from minicpm_tune.data.row_parsing import parse_row
from minicpm_tune.errors import DataError, RowError
from support.golden_checkpoints import processing
from support.rows import chat

PIXELS = {"ref": ["cup"], "bbox": [[6, 4, 30, 20]]}


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a.png")
    return tmp_path / "a.png"


def opened(picture, name="v2_6", *, question="Find <ref-object>.", answer="<bbox>", **row):
    path = picture.with_name("rows.jsonl")
    row = {"image": picture.name, "messages": chat(question, answer), "objects": PIXELS, **row}
    path.write_text(json.dumps(row) + "\n")
    return SupervisedDataset(path, processing(name))


def text(rows):
    return rows.processing.tokenizer.decode(rows[0]["input_ids"])


@pytest.mark.parametrize("name", [name for name in GENERATIONS if not name.startswith("xc2")])
def test_the_makers_form_is_written_with_the_tokens_that_the_model_has(picture, name):
    rows = opened(picture, name)
    written = text(rows).replace(" ", "")  # V-2's decoder puts spaces behind tokens
    assert "Find<ref>cup</ref>." in written
    assert "<box>100100500500</box>" in written
    vocabulary = rows.processing.tokenizer.get_vocab()
    ids = rows[0]["input_ids"].tolist()
    for tag in ("<ref>", "</ref>", "<box>", "</box>"):
        assert ids.count(vocabulary.get(tag, -1)) == (tag in vocabulary)
    assert ("<box>" in vocabulary) == (GENERATIONS[name].family != "minicpmv46")


def test_tags_typed_in_a_text_are_the_same_tokens(picture):
    typed = {"question": "Find <ref>cup</ref>.", "answer": "<box>100 100 500 500</box>", "objects": None}
    written = opened(picture)[0]["input_ids"]  # one file serves both
    assert opened(picture, **typed)[0]["input_ids"].tolist() == written.tolist()


def test_a_model_without_tokens_for_boxes_gets_brackets(picture):
    rows = opened(picture, "xc2_7b")
    assert "Find cup." in text(rows)
    assert "[100, 100, 500, 500]" in text(rows)
    assert rows.processing.boxes(rows.parse(0).turns, rows.open_media(0, rows.parse(0).sources)) == [
        [("cup", 6, 4, 30, 20)]
    ]


def test_in_a_literal_row_only_boxes_of_objects_are_tokens(picture):
    rows = opened(
        picture,
        question="Find <ref-object>, no <box>, and no <bbox> of mine.",
        answer="<think>",
        literal_control_tokens=True,
    )
    token = rows.processing.tokenizer.convert_tokens_to_ids("<box>")
    assert "Find <ref>cup</ref>, no <box>, and no <box>100 100 500 500</box> of mine." in text(rows)
    assert rows[0]["input_ids"].tolist().count(token) == 1


def test_more_marks_than_boxes_are_plain_text_in_a_literal_row(picture):
    rows = opened(picture, answer="<bbox>, then <bbox>", literal_control_tokens=True)
    assert "<box>100 100 500 500</box>, then <bbox>" in text(rows)


@pytest.mark.parametrize(("name", "expected"), [("v2_6", "100 100 500 500"), ("v4_6", "150 67 750 333")])
def test_pixels_are_those_of_the_picture_as_the_model_sees_it(picture, name, expected):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn, which 4.6 applies: 40 x 60
    Image.new("RGB", (60, 40), "red").save(picture.with_name("turned.jpg"), exif=exif)
    rows = opened(picture, name, image="turned.jpg")
    assert f"<box>{expected}</box>" in text(rows)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True])
def test_a_box_has_finite_numbers(value):
    row = {"image": "a.png", "messages": chat("Where?", "<bbox>"), "objects": {"bbox": [[0, 0, 1, value]]}}
    with pytest.raises(RowError, match=r"objects\.bbox 0 is .* in finite numbers"):
        parse_row(row)


def test_marks_in_thoughts_of_their_own_key_are_refused(picture):
    messages = [*chat("Find <ref-object>."), {"role": "assistant", "content": "It.", "thinking": "At <bbox>"}]
    with pytest.raises(RowError, match="turn 1 has <ref-object> or <bbox> in thoughts"):
        opened(picture, "v4_5", messages=messages).plan(0)


def test_thoughts_in_the_answer_may_hold_a_box(picture):
    rows = opened(picture, "v4_5", answer="<think>\nAt <bbox>?\n</think>\n\nYes.")
    assert "<think>\nAt <box>100 100 500 500</box>?\n</think>\n\nYes." in text(rows)


def test_the_check_of_the_rows_finds_a_box_outside_before_training(picture):
    rows = opened(picture, objects={"ref": ["cup"], "bbox": [[6, 4, 61, 20]]})
    with pytest.raises(DataError, match=r"1 of 1 rows can't be used:\n.*expected 0 to 60 across"):
        check_rows(rows, workers=0)


def test_boxes_are_found_in_pixels_on_their_picture(picture):
    Image.new("RGB", (40, 60), "blue").save(picture.with_name("b.png"))
    objects = {"ref": ["cup"], "bbox": [[4, 6, 20, 30], [30, 10]], "image_id": [1, 0]}
    rows = opened(picture, answer="<bbox>, <bbox>", image=None, images=["a.png", "b.png"], objects=objects)
    row = rows.parse(0)
    found = rows.processing.boxes(row.turns, rows.open_media(0, row.sources))
    assert found == [[("cup", 30, 10, 30, 10)], [("cup", 4, 6, 20, 30)]]


def test_typed_boxes_are_found_where_there_is_one_picture(picture):
    answer = "<ref>cup</ref><box>100 100 500 500</box> <ref>pen</ref><point>500 250</point><box>1 2 3</box>"
    rows = opened(picture, question="What?", answer=answer, objects=None)
    row = rows.parse(0)
    found = rows.processing.boxes(row.turns, rows.open_media(0, row.sources))
    assert found == [[("cup", 6, 4, 30, 20), ("pen", 30, 10, 30, 10)]]


def test_read_boxes_takes_whole_boxes_only():
    assert [box.values for box in read_boxes("<box>1 2 3</box><point>1 2 3 4</point><box>1 2 3 4")] == []
    assert [box.values for box in read_boxes("<box>(1,2),(3,4)</box>")] == [(1, 2, 3, 4)]
    assert [box.values for box in read_boxes("[1, 2, 3] [1, 2] [2021]", "brackets")] == [(1, 2)]


@pytest.mark.parametrize(
    ("other", "expected"), [((0, 0, 2, 2), 1), ((2, 2, 4, 4), 0), ((1, 1, 3, 3), 1 / 7), ((1, 1, 1, 1), 0)]
)
def test_overlap_of_boxes(other, expected):
    assert intersection_over_union((0, 0, 2, 2), other) == pytest.approx(expected)
