"""Control texts as plain text: never a special token, and the prompt around them as ever."""

import pytest

from minicpm_tune.data.row_parsing import parse_row
from minicpm_tune.data.token_labels import literal_tokenizer
from minicpm_tune.errors import RowError
from support.golden_checkpoints import ALL, processing
from support.rows import chat, picture
from support.xcomposer2_cases import rules as xcomposer2_rules

TEXTS = (
    "<image>", "</image>", "<slice>", "<image_id>", "<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|eot_id|>", "</s>",
    "<s>", "<unk>", "<|image_pad|>", "<video>", "<用户>", "<AI>", "[UNUSED_TOKEN_145]", "<think>",
)  # fmt: skip


def prepared(name):
    return xcomposer2_rules(name) if name.startswith("xc2") else processing(name)


def encoded(name, messages, images=(), **row):
    parsed = parse_row({"messages": messages, **row})
    sample = prepared(name).encode(parsed.turns, list(images))
    return sample["input_ids"].tolist(), sample["labels"].tolist()


@pytest.mark.parametrize("name", [*ALL, "xc2_7b"])
def test_literal_texts_add_no_special_token(name):
    tokenizer = prepared(name).tokenizer
    special = {
        token_id
        for text, token_id in tokenizer.get_added_vocab().items()
        if text[0] in "<[" and text[-1] in ">]"
    }
    text = "Tags: " + " and ".join(TEXTS) + "."
    plain, _ = encoded(name, chat("Tags: nothing.", "Tags: nothing."))
    literal, labels = encoded(name, chat(text, text), literal_control_tokens=True)
    assert [token for token in literal if token in special] == [token for token in plain if token in special]
    for found in TEXTS:
        assert found.replace(" ", "") in tokenizer.decode(literal).replace(" ", "")
    learned = tokenizer.decode([label for label in labels if label != -100]).replace(" ", "")
    assert learned == (text + prepared(name).generation.turn_end).replace(" ", "")


@pytest.mark.parametrize("name", [*ALL, "xc2_7b"])
def test_a_text_without_control_texts_has_the_same_tokens_either_way(name):
    images = [picture("wide")]
    row = {"image": "wide.png"}
    messages = chat("<image>Wie heißt  das?\n\n 你好 <ref>x</ref>", " Ein Hund.\nZwei.", "Sure?", "Yes")
    tokenizer = prepared(name).tokenizer
    marked = chat("<image>Wie heißt  das?\n\n 你好 <ref>x</ref>", " Ein Hund.\nZwei.", r"Sure\<unk>?", "Yes")
    ids, labels = encoded(name, messages, images, **row)
    marked_ids, marked_labels = encoded(name, marked, images, **row)
    start = next(place for place, pair in enumerate(zip(ids, marked_ids, strict=False)) if len(set(pair)) > 1)
    assert start > len(ids) / 2  # all in front of the literal text
    assert labels[:start] == marked_labels[:start]
    end = next(n for n in range(1, len(ids)) if ids[-n] != marked_ids[-n])
    assert end > 3  # and behind it
    assert "<unk>" in tokenizer.decode(marked_ids[start - 3 :])


@pytest.mark.parametrize("name", ["v2", "v2_6", "v4", "v4_5"])
def test_the_literal_tokenizer_reads_hidden_tokens_as_the_plain_one(name):
    tokenizer = processing(name).tokenizer
    text = (
        "<用户>Hi  <image><unk><unk></image>\nx<AI>y</s>"
        if name == "v2"
        else "a <|im_end|>\n<image><unk></image> b"
    )
    literal = literal_tokenizer(tokenizer)
    assert literal(literal.hide(text))["input_ids"] == tokenizer(text)["input_ids"]


def test_placeholders_take_the_row_s_images_and_the_rest_is_text():
    row = {"images": ["a", "b"], "literal_control_tokens": True}
    parsed = parse_row({**row, "messages": chat("<image> and <image_01>", "Write <image> or <video>.")})
    assert [source.value for source in parsed.sources] == ["a", "b"]
    assert parsed.turns[1].text == "Write <image> or <video>."


def test_a_single_image_is_taken_once_where_texts_are_literal():
    for image in ("a", {"<image_00>": "a"}):
        row = {"image": image, "literal_control_tokens": True}
        mark = "<image>" if image == "a" else "<image_00>"
        parsed = parse_row({**row, "messages": chat(f"{mark}Read it.", f"It says {mark}.")})
        assert [source.value for source in parsed.sources] == ["a"]
        assert parsed.turns[1].text == f"It says {mark}."


def test_without_the_switch_a_control_text_is_refused_with_the_ways_to_write_it():
    turns = parse_row({"messages": chat("What is <|im_end|>?", "An end.")}).turns
    with pytest.raises(RowError, match=r"backslash in front of it, or set \"literal_control_tokens\": true"):
        processing("v2_6").encode(turns, [])
    assert (
        processing("v2_6", literal_control_tokens=True)
        .parse({"messages": chat("<|im_end|>", "x")})
        .turns[0]
        .literal
    )


def test_the_switch_must_be_true_or_false():
    with pytest.raises(RowError, match="'literal_control_tokens' is 'yes', expected true or false"):
        parse_row({"literal_control_tokens": "yes", "messages": chat("a", "b")})
