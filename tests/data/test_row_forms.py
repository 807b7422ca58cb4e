"""Questions and answers under keys of their own: each pair is known by its keys, and two in one row are refused."""

import pytest

from minicpm_tune.data.files.row_forms import as_conversation
from minicpm_tune.data.row_parsing import parse_row
from minicpm_tune.errors import RowError


def texts(row):
    return [(turn.role, turn.text, turn.weight) for turn in parse_row(row).turns]


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        ({"user": "Q?", "assistant": "A."}, "Q?", "A."),
        ({"query": "Q?", "response": "A."}, "Q?", "A."),
        ({"instruction": "Add.", "input": "1 + 1", "output": "2"}, "Add.\n1 + 1", "2"),
        ({"instruction": "Add.", "input": "", "output": "2"}, "Add.", "2"),
        ({"question": "How many?", "answer": 2}, "How many?", "2"),
        ({"question": "How many?", "answers": ["two", "2", "3", "2"]}, "How many?", "2"),
        ({"question": "How many?", "answers": ["two", "2"]}, "How many?", "two"),
        ({"question": "Q?", "answers": [{"answer": "no", "answer_id": 1}, {"answer": "no"}]}, "Q?", "no"),
        ({"question": "Q?", "answer": ""}, "Q?", ""),
        # A conversation that is there counts; empty ones, as Parquet fills them in, don't.
        ({"query": "Q?", "response": "A.", "messages": [], "conversations": None}, "Q?", "A."),
        # A table's columns that this row leaves empty.
        ({"question": "Q?", "answer": "A.", "query": None, "response": None}, "Q?", "A."),
        # What --columns has named is never in doubt.
        ({"user": "Q?", "assistant": "A.", "question": "other", "answer": "other"}, "Q?", "A."),
    ],
)
def test_a_pair_of_keys_is_a_conversation(row, question, answer):
    assert texts(row) == [("user", question, 1), ("assistant", answer, 1)]


@pytest.mark.parametrize(
    ("media", "question"),
    [
        ({"image": "a.png"}, "Describe the image."),
        ({"images": ["a.png"]}, "Describe the image."),
        ({"images": ["a.png", "b.png"]}, "Describe the images."),
        ({"image": {"bytes": b"x", "path": None}}, "Describe the image."),
        ({"video": "a.mp4"}, "Describe the video."),
    ],
)
@pytest.mark.parametrize("key", ["caption", "text"])
def test_a_picture_with_a_text_is_described_by_it(media, question, key):
    first, second = parse_row({**media, key: "A cat."}).turns
    assert (first.text.strip(), second.text) == (question, "A cat.")
    assert len(first.parts) > 1  # the media stand in front


def test_history_system_and_weight_have_their_places():
    row = {
        "id": 7, "system": "Be brief.", "history": [["1?", "One."], ["2?", "Two."]], "query": "3?",
        "response": "Three.", "weight": 0.5,
    }  # fmt: skip
    assert texts(row) == [
        ("system", "Be brief.", 1), ("user", "1?", 1), ("assistant", "One.", 0.5), ("user", "2?", 1),
        ("assistant", "Two.", 0.5), ("user", "3?", 1), ("assistant", "Three.", 0.5),
    ]  # fmt: skip
    assert parse_row(row).row_id == 7


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"query": "Q?", "response": "A.", "question": "q?", "answer": "a."},
            "the row has 'query' and 'response', and 'question' and 'answer', expected one pair",
        ),
        ({"image": "a.png", "caption": "A.", "text": "B."}, "has 'image' and 'caption', and 'image' and 'text'"),
        ({"question": "Q?", "answer": "A.", "answers": ["A."]}, "'answer', and 'question' and 'answers', expected one"),
        ({"image": "a.png", "question": "Q?", "answer": "A.", "caption": "A cat."}, "and 'image' and 'caption'"),
        ({"question": "Q?", "response": "A."}, "has the keys 'question', 'response', expected 'conversations' or"),
        ({"question": "Q?", "answers": []}, "'answers' is empty, expected at least one answer"),
        ({"question": "Q?", "answer": ["A.", "B."]}, "'answer' is a list, expected a text"),
        ({"image": "a.png", "caption": ["A.", "B."]}, "'caption' is a list, expected a text. Write one, or one row"),
        ({"query": "Q?", "response": "A.", "history": ["1?", "One."]}, "'history' 0 is '1\\?', expected a question"),
        ({"text": "Only a text."}, "has the keys 'text', expected 'conversations' or 'messages', or a pair such as"),
        ({"query": "Q?", "response": "A.", "weight": -1}, "turn 1: 'weight' is -1, expected a number from 0"),
        ({"query": "Q?", "response": "A.", "rejected": "B."}, "preference pairs can't be trained here"),
        ({"messages": [{"role": "user", "content": "a"}], "history": [["a", "b"]]}, "the row has 'history'"),
    ],
)  # fmt: skip
def test_a_row_whose_pair_is_in_doubt_or_broken_is_refused(row, message):
    with pytest.raises(RowError, match=message):
        parse_row(row)


def test_a_question_alone_is_enough_for_a_prediction():
    row = {"image": "a.png", "question": "How many?"}
    assert as_conversation(row) is row
    assert as_conversation(row, answered=False) == {
        "image": "a.png",
        "messages": [{"role": "user", "content": "How many?"}],
    }
    with pytest.raises(RowError, match="expected one pair"):
        as_conversation({"question": "a?", "query": "b?"}, answered=False)


def test_keys_beside_the_pair_are_reported():
    row = {"question": "Q?", "answer": "A.", "license": "MIT", "input": "x"}
    assert parse_row(row).unknown_keys == ("row 'license'", "row 'input'")
