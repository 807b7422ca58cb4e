"""Thinking in the prompts of V-4.5, 4.6 and 4.7."""

import pytest

from minicpm_tune.data.prompts import PromptWriter
from minicpm_tune.data.samples import load_processing
from minicpm_tune.settings.data_arguments import DataArguments
from support.golden_checkpoints import checkpoint_folder, encoded, supervised_text
from support.rows import chat, turns_of
from support.tiny_checkpoints import checkpoint

THINKING = ("v4_5", "v4_6", "v4_7")
THOUGHTFUL = "<think>\nOne, two.\n</think>\n\nTwo cats."


@pytest.mark.parametrize("name", THINKING)
def test_an_answer_without_thoughts_follows_the_empty_think_block(name):
    sample, tokenizer = encoded(name, chat("How many?", "Two cats."))
    text = tokenizer.decode(sample["input_ids"])
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\nTwo cats.<|im_end|>\n")
    assert supervised_text(sample, tokenizer) == "Two cats.<|im_end|>"


@pytest.mark.parametrize("name", THINKING)
def test_an_answer_with_thoughts_trains_with_them(name):
    sample, tokenizer = encoded(name, chat("How many?", THOUGHTFUL))
    assert tokenizer.decode(sample["input_ids"]).endswith(f"<|im_start|>assistant\n{THOUGHTFUL}<|im_end|>\n")
    assert supervised_text(sample, tokenizer) == f"{THOUGHTFUL}<|im_end|>"


@pytest.mark.parametrize("name", THINKING)
def test_enable_thinking_false_trains_without_thoughts(name):
    sample, tokenizer = encoded(name, chat("How many?", THOUGHTFUL), enable_thinking="false")
    assert supervised_text(sample, tokenizer) == "Two cats.<|im_end|>"
    assert tokenizer.decode(sample["input_ids"]).count("<think>") == 1


def test_enable_thinking_true_asks_for_thoughts_of_every_answer():
    sample, tokenizer = encoded("v4_5", chat("How many?", "Two cats."), enable_thinking="true")
    assert tokenizer.decode(sample["input_ids"]).endswith("<|im_start|>assistant\nTwo cats.<|im_end|>\n")


def test_a_template_that_opens_the_think_block_does_not_get_a_second_one():
    prepared = load_processing(checkpoint_folder("v4_6"))  # of its own: the template is changed
    template = prepared.tokenizer.chat_template
    changed = template.replace(
        "<think>\n\n</think>\n\n", "<think>\n{% if not enable_thinking %}\n</think>\n\n{% endif %}"
    )
    assert changed != template
    prepared.tokenizer.chat_template = changed
    writer = PromptWriter(prepared.tokenizer, prepared.generation)
    text = "".join(piece.text for piece in writer.training_pieces(turns_of(chat("Hi", THOUGHTFUL))))
    assert text.endswith(f"<|im_start|>assistant\n{THOUGHTFUL}<|im_end|>\n")


def test_thoughts_of_earlier_answers_are_left_out_as_the_template_does():
    sample, tokenizer = encoded("v4_5", chat("How many?", THOUGHTFUL, "Sure?", "Yes."))
    assert supervised_text(sample, tokenizer) == "Two cats.<|im_end|>Yes.<|im_end|>"


def thinking_model(**options):
    return load_processing(checkpoint("v4_6_thinking"), DataArguments.of_checkpoint(**options))


@pytest.mark.parametrize(
    ("answer", "wish", "prompt_end", "learned"),
    [
        (THOUGHTFUL, "auto", "<think>\n", "One, two.\n</think>\n\nTwo cats.<|im_end|>"),
        ("Two cats.", "auto", "<think>\n", "\n</think>\n\nTwo cats.<|im_end|>"),
        ("Two cats.", "true", "<think>\n", "\n</think>\n\nTwo cats.<|im_end|>"),
        (THOUGHTFUL, "false", "<think>\n\n</think>\n\n", "Two cats.<|im_end|>"),
    ],
)
def test_a_model_that_thinks_by_itself_is_trained_from_the_prompt_that_it_is_asked_with(
    answer, wish, prompt_end, learned
):
    prepared = thinking_model(enable_thinking=wish)
    assert prepared.generation.title == "MiniCPM-V 4.6-Thinking"
    turns = turns_of(chat("How many?", answer))
    sample, prompt = prepared.encode(turns, ()), prepared.encode_prompt(turns[:1], ())
    assert supervised_text(sample, prepared.tokenizer) == learned
    ids, asked = sample["input_ids"].tolist(), prompt["input_ids"].tolist()
    assert prepared.tokenizer.decode(asked).endswith(f"<|im_start|>assistant\n{prompt_end}")
    assert ids[: len(asked)] == asked
    assert (sample["labels"][: len(asked)] == -100).all()


def test_a_model_that_thinks_by_itself_can_be_told_not_to():
    prepared, turns = thinking_model(), turns_of(chat("How many?", "Two."))[:1]
    ends = [
        prepared.tokenizer.decode(prepared.encode_prompt(turns, (), thinking=wish)["input_ids"][-4:])
        for wish in (None, True, False)
    ]
    assert [end.endswith("<think>\n") for end in ends] == [True, True, False]
    assert ends[2].endswith("</think>\n\n")
