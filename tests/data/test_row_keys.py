"""Keys that nothing reads are named, each once; nulls, as Parquet fills them in, are no keys."""

import pytest

from minicpm_tune.data.row_parsing import parse_row
from support.rows import chat


def unknown(**row):
    return parse_row({"messages": chat("Hi", "Yes"), **row}).unknown_keys


def test_unknown_keys_of_row_message_and_part_are_named_once():
    messages = [
        {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "Hi", "style": "bold"}]},
        {"role": "assistant", "name": "Bob", "content": "Yes"},
    ]
    found = unknown(messages=messages, license="MIT", source="web", id=3)
    assert found == ("row 'license'", "row 'source'", "message 'name'", "part 'style'")


@pytest.mark.parametrize("empty", [None, "", [], {}])
@pytest.mark.parametrize("key", ["objects", "audios", "image_path", "tools", "license"])
def test_empty_values_are_no_keys(key, empty):
    assert unknown(**{key: empty}) == ()


@pytest.mark.parametrize(("key", "value"), [("weight", 1), ("loss", True), ("loss_scale", 1.0)])
def test_neutral_weights_of_a_row_pass(key, value):
    assert unknown(**{key: value}) == ()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_id", 17),
        ("image_size", [3, 4]),
        ("picture_count", 2),
        ("video_id", "abc"),
        ("imagenet_class", "cat"),
    ],
)
def test_facts_about_media_are_unknown_keys_and_no_media(key, value):
    assert unknown(**{key: value}) == (f"row {key!r}",)
