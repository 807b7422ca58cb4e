"""Rows in every accepted form, and what is said about the others."""

import pytest

from minicpm_tune.data.row_parsing import parse_row
from minicpm_tune.data.turns import Media
from minicpm_tune.errors import RowError
from support.rows import chat

QA = chat("<image>\nWhat is it?", "A cat.")


def parts(row, turn=0):
    return list(parse_row(row).turns[turn].parts)


def values(row):
    return [source.value for source in parse_row(row).sources]


IMAGE = Media("image", 0)


@pytest.mark.parametrize(
    "row",
    [
        {"id": "0", "image": "a.jpg", "conversations": QA},
        {"image": "a.jpg", "messages": QA},
        {"image": ["a.jpg"], "conversations": QA},
        {"images": ["a.jpg"], "conversations": QA},
        {"images": "a.jpg", "messages": QA},
        {"image": {"<image_00>": "a.jpg"}, "conversations": chat("<image_00>\nWhat is it?", "A cat.")},
        {"image": "a.jpg", "conversations": chat("What is it?", "A cat.")},
        {"image": {"<image_00>": "a.jpg"}, "conversations": chat("What is it?", "A cat.")},
        {
            "image": "a.jpg",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": "A cat."},
            ],
        },
        {
            "image": ["a.jpg"],
            "conversations": [
                {"from": "user", "value": "<ImageHere>\nWhat is it?"},
                {"from": "assistant", "value": "A cat."},
            ],
        },
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": "a.jpg"},
                        {"type": "text", "text": "\nWhat is it?"},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
            ]
        },
        {
            "images": ["a.jpg"],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nWhat is it?"}]},
                {"role": "assistant", "content": "A cat."},
            ],
        },
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "a.jpg"}}, "\nWhat is it?"],
                },
                {"role": "assistant", "content": "A cat."},
            ]
        },
    ],
)
def test_every_form_gives_the_same_conversation(row):
    conversation = parse_row(row)
    assert [turn.role for turn in conversation.turns] == ["user", "assistant"]
    assert conversation.turns[0].parts == (IMAGE, "\nWhat is it?")
    assert conversation.turns[1].parts == ("A cat.",)
    assert [source.value for source in conversation.sources] == ["a.jpg"]


def test_pixels_follow_the_order_of_the_text():
    row = {
        "image": {"<image_00>": "a", "<image_01>": "b"},
        "conversations": chat("<image_01> then <image_00>", "x", "again <image_01>", "y"),
    }
    assert values(row) == ["b", "a", "b"]
    assert parts(row) == [Media("image", 0), " then ", Media("image", 1)]
    assert parts(row, 2) == ["again ", Media("image", 2)]


def test_images_never_mentioned_go_first_in_the_order_of_the_keys():
    row = {
        "image": {"<image_02>": "c", "<image_00>": "a", "<image_01>": "b"},
        "conversations": chat("Compare <image_01>.", "x", system="s"),
    }
    assert values(row) == ["c", "a", "b"]
    assert parts(row, 1) == [Media("image", 0), "\n", Media("image", 1), "\nCompare ", Media("image", 2), "."]
    listed = {"images": ["a", "b"], "conversations": chat("Compare <image>.", "x")}
    assert values(listed) == ["b", "a"]


def test_the_only_image_may_be_mentioned_again():
    assert values({"image": "a", "conversations": chat("<image> <image>", "x", "<image>", "y")}) == [
        "a",
        "a",
        "a",
    ]


def test_numbered_placeholders_index_a_list():
    assert values({"images": ["a", "b"], "conversations": chat("<image_01> <image_00>", "x")}) == ["b", "a"]


def test_text_only_rows_may_carry_empty_image_fields():
    for empty in (None, "", [], {}):
        assert values({"image": empty, "conversations": chat("Hi", "x")}) == []
    assert values({"image": {"<image_00>": None}, "conversations": chat("Hi", "x")}) == []


def test_videos_and_frame_lists():
    row = {"video": "a.mp4", "conversations": chat("<video>\nWhat?", "x")}
    assert parts(row) == [Media("video", 0), "\nWhat?"]
    assert values(row) == ["a.mp4"]
    assert values({"video": ["1.jpg", "2.jpg"], "conversations": chat("What?", "x")}) == [["1.jpg", "2.jpg"]]
    assert values({"video": ["a.mp4", "b.mp4"], "conversations": chat("<video><video>", "x")}) == [
        "a.mp4",
        "b.mp4",
    ]
    assert values({"videos": [["1.jpg"], "b.mp4"], "conversations": chat("What?", "x")}) == [
        ["1.jpg"],
        "b.mp4",
    ]
    mixed = {"video": "a.mp4", "image": "b.jpg", "conversations": chat("<image> and <video>", "x")}
    assert values(mixed) == ["b.jpg", "a.mp4"]


def test_loss_marks_and_system_turns_are_read():
    messages = chat("Hi", "x", system="s")
    messages[2]["loss"] = False
    turns = parse_row({"conversations": messages}).turns
    assert [turn.role for turn in turns] == ["system", "user", "assistant"]
    assert [turn.weight for turn in turns] == [1, 1, 0]


def bad(messages, **row):
    return {"conversations": messages, **row}


HI = {"role": "user", "content": "Hi"}
YES = {"role": "assistant", "content": "Yes"}


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        ("text", "form", "the row is a text, expected an object with 'conversations'"),
        ([1], "form", "the row is a list"),
        ({"id": 3, "text": "x"}, "form", "has the keys 'id', 'text', expected 'conversations' or 'messages'"),
        (bad("Hi"), "form", "'conversations' is a text, expected a list of messages"),
        (bad([]), "form", "'conversations' is empty"),
        (bad(["Hi"]), "form", "turn 0 is a text, expected an object with 'role' and 'content'"),
        (bad([{"role": "user"}, YES]), "form", r"turn 0: the content is missing \(null\)"),
        (
            bad([{"role": "user", "content": 3}, YES]),
            "form",
            "the content is a number, expected a text or a list",
        ),
        (
            bad([{"role": "user", "content": [{"type": "audio"}]}, YES]),
            "audio",
            "part of type 'audio', expected 'text'.*takes no audio",
        ),
        (bad([{"role": "user", "content": [{"type": ["x"]}]}, YES]), "form", r"part of type \['x'\]"),
        (bad([{"role": "user", "content": [7]}, YES]), "form", "part of type a number"),
        (bad([HI, {**YES, "loss": "no"}]), "form", "'loss' is 'no', expected true or false"),
        (
            bad([{"role": "cat", "content": "x"}, YES]),
            "role",
            "turn 0 has role 'cat', expected 'user', 'assistant'",
        ),
        (bad([{"content": "x"}, YES]), "role", "turn 0 has role None"),
        (bad([{"role": ["user"], "content": "x"}, YES]), "role", r"turn 0 has role \['user'\]"),
        (
            bad([HI, {"role": "tool", "content": "x"}]),
            "role",
            "turn 1 has role 'tool'.*Tool turns can't be trained",
        ),
        (bad([HI, {**YES, "tool_calls": [1]}]), "key", "turn 1 has 'tool_calls': tool use"),
        (bad([HI, HI, YES]), "role", "turn 1 has role 'user', expected 'assistant'"),
        (bad([YES, HI]), "role", "turn 0 has role 'assistant', expected 'user'"),
        (bad([HI, YES, YES]), "role", "turn 2 has role 'assistant', expected 'user'"),
        (bad([HI, YES, HI]), "role", r"the last turn \(turn 2\) has role 'user', expected 'assistant'"),
        (bad([{"role": "system", "content": "x"}]), "role", "the last turn"),
        (
            bad([HI, {"role": "system", "content": "x"}, YES]),
            "role",
            "turn 1 has role 'system', expected 'assistant'",
        ),
        (bad(QA), "placeholder", "turn 0 has a <image> for image number 1, but the row has no images"),
        (
            bad(chat("<image> <image>", "x"), images=["a"]),
            "placeholder",
            "image number 2, but the row has 1 image",
        ),
        (
            bad(chat("<image_03>", "x"), images=["a"]),
            "placeholder",
            "turn 0 mentions <image_03>, but the row has 1",
        ),
        (bad(chat("<image_01>", "x"), image={"<image_00>": "a"}), "placeholder", "images are '<image_00>'"),
        (bad(chat("<video>", "x"), image="a"), "placeholder", "video number 1, but the row has no videos"),
        (bad(QA, image={"cat": "a"}), "media", "'image' has the key 'cat', expected keys like '<image_00>'"),
        (bad(QA, image="a", images=["b"]), "media", "has both 'image' and 'images'"),
    ],
)
def test_other_rows_are_refused_with_place_and_remedy(row, kind, message):
    with pytest.raises(RowError, match=message) as caught:
        parse_row(row)
    assert caught.value.kind == kind
