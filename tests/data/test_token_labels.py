"""Prompts, labels and truncation in every generation."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from minicpm_tune.batch import IGNORE_INDEX
from minicpm_tune.checkpoints.model_folder import ModelFolderError
from minicpm_tune.data.media.images import Picture
from minicpm_tune.data.prompts import PromptWriter
from minicpm_tune.data.slicing.adaptive import SliceRules
from minicpm_tune.data.token_labels import truncate
from minicpm_tune.data.turns import Turn
from minicpm_tune.errors import DroppedRowError, RowError
from support.golden_checkpoints import ALL, encoded, limited, processing, supervised_text
from support.rows import chat, turns_of

TURN_END = {"v2": "</s>", "v2_5": "<|eot_id|>"}


def turn_end(name):
    return TURN_END.get(name, "<|im_end|>")


def picture(width=60, height=40):
    return Image.new("RGB", (width, height), (90, 120, 40))


@pytest.mark.parametrize("name", ALL)
def test_supervised_tokens_are_the_answers_and_their_ends(name):
    messages = chat("<image_00>\nHow many?", "Two cats.", "And here? <image_01>", "One dog.", "Sure?", "Yes.")
    row = {"image": {"<image_00>": "a.png", "<image_01>": "b.png"}}
    sample, tokenizer = encoded(name, messages, [picture(900, 700), picture()], row)
    end = turn_end(name)
    between = "" if name == "v2" else end  # V-2 has no token between turns
    assert supervised_text(sample, tokenizer) == f"Two cats.{between}One dog.{between}Yes.{end}"


@pytest.mark.parametrize("name", ALL)
def test_the_weight_of_a_message_is_on_its_tokens_alone(name):
    messages = chat("How many?", "Two cats.", "And here?", "One dog.", "Sure?", "Yes.")
    messages[1]["weight"], messages[3]["weight"] = 0.25, 0
    sample, tokenizer = encoded(name, messages)
    end = turn_end(name)
    by_weight = {
        weight: tokenizer.decode(
            sample["labels"][(sample["labels"] != IGNORE_INDEX) & (sample["loss_weights"] == weight)]
        )
        for weight in sample["loss_weights"].unique().tolist()
    }
    assert by_weight == {0.25: "Two cats." + ("" if name == "v2" else end), 1.0: f"Yes.{end}"}
    del messages[1]["weight"]
    assert "loss_weights" not in encoded(name, messages)[0]


@pytest.mark.parametrize("name", ALL)
def test_text_only_rows_work(name):
    sample, tokenizer = encoded(name, chat("How many?", "Two cats."))
    assert supervised_text(sample, tokenizer) == f"Two cats.{turn_end(name)}"
    assert sample["pixel_values"].shape == (3, 14, 0)
    assert sample["tgt_sizes"].shape == sample["image_bound"].shape == (0, 2)


@pytest.mark.parametrize("name", ALL)
def test_the_prompt_in_front_of_the_last_answer_is_the_one_of_inference(name):
    prepared = processing(name)
    for answer in (
        "Two cats.",
        "\nTwo cats.",
        "\n\n  Two cats.",
        " Two",
        "\t",
        "é",
        "<box>1 2</box>",
        "图片",
    ):
        turns = turns_of(chat("Look: <image>", "A cat.", "How many?\n", answer), image="a.png")
        sample = prepared.encode(turns, [picture()])
        prompt = prepared.encode_prompt(turns[:-1], [picture()])
        length = len(prompt["input_ids"])
        assert sample["input_ids"][:length].tolist() == prompt["input_ids"].tolist()
        first = (sample["labels"][length:] != IGNORE_INDEX).nonzero()[0, 0]
        assert first == 0, "the answer starts where the prompt ends"


@pytest.mark.parametrize("name", ALL)
def test_an_answer_is_learned_as_it_is_written(name):
    trims = name == "v2_5"  # its template trims every message
    for answer in ("\nTwo cats.", "  Two cats. ", "Two\n\ncats.\n", "🎉 cats", "Two  cats"):
        sample, tokenizer = encoded(name, chat("How many?", answer))
        expected = (answer.strip() if trims else answer) + turn_end(name)
        assert supervised_text(sample, tokenizer).lstrip(" ") == expected.lstrip(" ")


@pytest.mark.parametrize("name", ALL)
def test_image_bounds_enclose_the_pad_tokens(name):
    prepared = processing(name)
    sample = prepared.encode(
        turns_of(chat("A <image> and <image>.", "Yes."), images=["a", "b"]), [picture(1200, 500), picture()]
    )
    pad = prepared.tokenizer.convert_tokens_to_ids(prepared.style.pad)
    places = (sample["input_ids"] == pad).nonzero()[:, 0].tolist()
    bounds = sample["image_bound"].tolist()
    assert places == [place for start, end in bounds for place in range(start, end)]
    counts = [prepared.style.token_count(tuple(size)) for size in sample["tgt_sizes"].tolist()]
    assert [end - start for start, end in bounds] == counts


def test_a_system_turn_stands_in_front_everywhere():
    for name in ALL:
        prepared = processing(name)
        turns = turns_of(chat("<image>\nHow many?", "Two.", system="Be short."), image="a.png")
        text = prepared.tokenizer.decode(prepared.encode(turns, [picture()])["input_ids"])
        assert "Be short." in text
        assert text.index("Be short.") < text.index("How many?"), name


def test_v2_puts_the_system_text_behind_the_image():
    prepared = processing("v2")
    for question, expected in (
        ("<image>\nHow many?", "</image> \nBe short.\nHow many?<AI>"),
        ("How many? <image>", "<用户>Be short.\nHow many? <image>"),
    ):
        turns = turns_of(chat(question, "Two.", system="Be short."), image="a.png")
        assert expected in prepared.tokenizer.decode(prepared.encode(turns, [picture()])["input_ids"])


def test_v2_writes_its_own_format():
    prepared = processing("v2")
    turns = turns_of(chat("<image>\nHow many?", "Two cats.", "Sure?", "Yes."), image="a.png")
    sample = prepared.encode(turns, [picture(1200, 500)])
    text = prepared.tokenizer.decode(sample["input_ids"]).replace("<unk>" * 16, "U")
    assert text == (
        "<s> <用户><image>U</image><slice><image>U</image><image>U</image></slice> \nHow many?"
        "<AI>Two cats.<用户>Sure?<AI>Yes.</s>"
    )
    assert sample["tgt_sizes"].tolist() == [[21, 50], [29, 35], [29, 35]]
    assert sample["image_bound"].tolist() == [[4, 20], [23, 39], [41, 57]]


def test_default_system_lines_come_from_the_template():
    text = processing("v2_6").tokenizer.decode(encoded("v2_6", chat("Hi", "Yes."))[0]["input_ids"])
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    text = processing("o2_6").tokenizer.decode(encoded("o2_6", chat("Hi", "Yes."))[0]["input_ids"])
    assert "You are Qwen, created by Alibaba Cloud." in text


# --- what is learned ---


@pytest.mark.parametrize("name", ALL)
def test_train_on_last_turn_learns_the_last_answer_only(name):
    sample, tokenizer = encoded(name, chat("How many?", "Two.", "Sure?", "Yes."), train_on="last_turn")
    assert supervised_text(sample, tokenizer) == f"Yes.{turn_end(name)}"


def test_loss_false_leaves_an_answer_out():
    messages = chat("How many?", "Two.", "Sure?", "Yes.")
    messages[1]["loss"] = False
    sample, tokenizer = encoded("v2_6", messages)
    assert supervised_text(sample, tokenizer) == "Yes.<|im_end|>"
    messages[3]["loss"] = False
    with pytest.raises(RowError, match=r"none of the .* tokens is supervised, expected an answer to learn"):
        encoded("v2_6", messages)


def test_an_empty_answer_learns_to_end_the_turn():
    sample, tokenizer = encoded("v2_6", chat("How many?", "", "Sure?", "Yes."))
    assert supervised_text(sample, tokenizer) == "<|im_end|>Yes.<|im_end|>"


def test_images_in_an_answer_are_not_learned():
    sample, tokenizer = encoded(
        "v2_6", chat("Show one.", "Here: <image> a cat."), [picture()], {"image": "a.png"}
    )
    assert supervised_text(sample, tokenizer) == "Here:  a cat.<|im_end|>"
    assert len(sample["image_bound"]) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("v2_6", "A <|im_end|> mark"), ("v2_6", "</image>"), ("v2_5", "<|eot_id|>"), ("v2", "<用户>"),
        ("v4_6", "<|image_pad|>"), ("v4", "<unk>"),
    ],
)  # fmt: skip
def test_control_tokens_in_a_message_are_refused(name, text):
    with pytest.raises(RowError, match="which the model reads as structure"):
        encoded(name, chat("Hi", text))


def test_private_characters_in_a_text_are_text():
    for name in ALL:
        sample, tokenizer = encoded(
            name, chat("<image> \ue000 what? \ue001", "A \ue000 sign."), [picture()], {"image": "a"}
        )
        assert supervised_text(sample, tokenizer) == f"A \ue000 sign.{turn_end(name)}"


def test_a_template_that_refuses_a_conversation_makes_a_bad_row():
    prepared = processing("v2_6")
    tokenizer = prepared.tokenizer
    template = tokenizer.chat_template
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    tokenizer.chat_template = refusal + template
    try:
        encoded("v2_6", chat("Hi", "Yes."))
        with pytest.raises(RowError, match=r"chat template refuses the conversation \(no system here\)"):
            encoded("v2_6", chat("Hi", "Yes.", system="s"))
    finally:
        tokenizer.chat_template = template


def test_a_template_that_loses_turns_is_refused():
    prepared = processing("v2_6")
    tokenizer = prepared.tokenizer
    template, broken = tokenizer.chat_template, "{{ messages[0]['content'] }}<|im_end|>"
    tokenizer.chat_template = broken
    try:
        writer = PromptWriter(tokenizer, prepared.generation)
        with pytest.raises(ModelFolderError, match="rendered 1 turns for 3 messages"):
            writer.training_pieces(turns_of(chat("a", "b", "c", "d")))
        tokenizer.chat_template = None
        with pytest.raises(ModelFolderError, match="has no chat template"):
            PromptWriter(tokenizer, prepared.generation)
    finally:
        tokenizer.chat_template = template


# --- length ---


WORDS = st.text(alphabet="ab \n.é<", min_size=0, max_size=12)
CONVERSATIONS = st.lists(st.tuples(WORDS, WORDS, st.integers(0, 2)), min_size=1, max_size=4)


def random_turns(parts):
    """Turns with some images, and the sizes of the images."""
    messages, images = [], []
    for question, answer, count in parts:
        messages += chat("<image>" * count + question, answer)
        images += [(100 + 700 * (count == 2), 80 + 300 * len(question) % 900)] * count
    row = {"images": [f"{index}.png" for index in range(len(images))]} if images else {}
    return turns_of(messages, **row), images


@pytest.mark.parametrize("name", ["v2", "v2_5", "v2_6", "v4_5", "v4_7"])
@settings(max_examples=40)
@given(parts=CONVERSATIONS, limit=st.integers(1, 400))
def test_truncation_keeps_images_whole_and_answers_from_their_start(name, parts, limit):
    prepared = processing(name)
    turns, sizes = random_turns(parts)
    plan = prepared.plan(turns, [Picture("image", (size,), lambda: []) for size in sizes])
    layouts = [frames[0] for frames in plan.layouts]
    whole = plan.encoded
    cut = truncate(whole, limit)
    length = len(cut.input_ids)
    assert length <= min(limit, len(whole.input_ids))
    assert cut.input_ids == whole.input_ids[:length]
    assert cut.labels == whole.labels[:length]
    inside = [span for span in whole.media_spans if span[0] < length < span[1]]
    assert not inside
    if length < min(limit, len(whole.input_ids)):  # cut in front of the image that the limit falls into
        assert any(start == length and limit < end for start, end in whole.media_spans)
    assert cut.image_bound == [bound for bound in whole.image_bound if bound[1] <= length]
    expected = [prepared.style.token_count(size) for layout in layouts for size in layout.tgt_sizes]
    assert [end - start for start, end in cut.image_bound] == expected[: len(cut.image_bound)]


def long_row():
    return turns_of(chat("<image>\nHow many?", "Two cats and one dog."), image="a.png"), [picture(1300, 1300)]


def test_overlength_policies():
    prepared = processing("v2_6")
    turns, images = long_row()
    whole = prepared.encode(turns, images)
    length = len(whole["input_ids"])

    cut = limited(prepared, length - 4).encode(turns, images)
    assert len(cut["input_ids"]) == length - 4
    assert "Two cats and one dog.<|im_end|>".startswith(supervised_text(cut, prepared.tokenizer))

    with pytest.raises(
        RowError, match=rf"is {length} tokens long, expected at most --model_max_length {length - 1}"
    ):
        limited(prepared, length - 1, overlength="error").encode(turns, images)
    with pytest.raises(DroppedRowError, match=f"is {length} tokens long"):
        limited(prepared, length - 1, overlength="drop").encode(turns, images)

    smaller = limited(prepared, length - 1, overlength="shrink_slices").encode(turns, images)
    assert 1 < len(smaller["tgt_sizes"]) < len(whole["tgt_sizes"])
    assert supervised_text(smaller, prepared.tokenizer) == "Two cats and one dog.<|im_end|>"
    assert len(smaller["input_ids"]) <= length - 1


def test_a_row_cut_down_to_its_question_is_a_bad_row():
    prepared = processing("v2_6")
    turns, images = long_row()
    with pytest.raises(
        RowError, match=r"none of the .* tokens that --model_max_length 100 leaves is supervised"
    ):
        limited(prepared, 100).encode(turns, images)


def test_shrinking_falls_back_to_cutting():
    prepared = processing("v2_6")
    turns, images = long_row()
    fits = len(limited(prepared, 10_000).encode(turns, images)["input_ids"])
    least = prepared.encode(turns, [picture(60, 60)])  # one slice
    limit = len(least["input_ids"]) - 3
    assert limit < fits
    sample = limited(prepared, limit, overlength="shrink_slices").encode(turns, images)
    assert len(sample["input_ids"]) == limit
    assert len(sample["tgt_sizes"]) == 1


def test_a_turn_keeps_its_text_apart_from_its_media():
    turn = turns_of(chat("A <image> b", "c"), image="x")[0]
    assert turn.text == "A  b"
    assert Turn("user", ("a", "b")).text == "ab"
    assert SliceRules(max_slice_nums=9).limited(4).max_slice_nums == 4
