"""Answering: prompt ids, the key/value cache, batches, streaming, and chat in the released form."""

import json
from functools import cache

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

import chat
from minicpm_tune.answering import chat as answering_chat
from minicpm_tune.answering.chat import MessageError, read_messages
from minicpm_tune.answering.generate import GREEDY, INCOMPLETE, TextPieces, answer, decode, stop_ids
from minicpm_tune.data.media.audio import Clip
from minicpm_tune.data.media.images import Picture
from minicpm_tune.data.sample_tensors import data_collator
from minicpm_tune.data.samples import load_processing
from minicpm_tune.data.turns import Media, Turn
from minicpm_tune.errors import RowError
from support.golden_checkpoints import WITH_GOLDENS, checkpoint_folder, processing
from support.golden_models import golden_weight
from support.paths import GOLDENS, IMAGES
from support.rows import picture
from support.tiny_checkpoints import ALL, checkpoint, loaded, saved_adapter

QUESTION = [{"role": "user", "content": "What is it?"}]
SHORT = GREEDY | {"sampling": False, "max_new_tokens": 8}


@cache
def asking(name):
    """A small model whose weights are large enough for every image and word to change its answers."""
    model = loaded(checkpoint(name), name)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if key != "resampler.pos_embed":
                filled = golden_weight(key, tuple(value.shape), seed=1, v2=name == "v2")
                value.copy_(torch.from_numpy(filled))
    return model


@cache
def rules_of(name):
    return load_processing(checkpoint(name))


def as_message(message, pictures):
    """A goldens message, whose ``<image>`` marks lines, as the released chat takes it."""
    if "<image>" not in message["content"]:
        return message
    pieces = message["content"].split("\n")
    return {**message, "content": [next(pictures) if piece == "<image>" else piece for piece in pieces]}


@pytest.mark.parametrize(("name", "flag"), [("o2_6_audio", "omni_input"), ("o4_5", "omni_mode")])
def test_the_omni_form_joins_parts_by_nothing(name, flag, monkeypatch):
    def prompts(model, processing, samples, **options):
        assert not options.keys() & {"omni_input", "omni_mode"}
        return [processing.tokenizer.decode(sample["input_ids"]).replace("<unk>", "") for sample in samples]

    monkeypatch.setattr("minicpm_tune.answering.generate.answer", prompts)
    second = np.zeros(16_000, np.float32)
    msgs = [{"role": "user", "content": [picture(), second, "What?"]}]
    plain, joined = (
        answering_chat.chat(
            None, None, msgs, processor=processing(name), max_slice_nums=1, use_image_id=False, **form
        )
        for form in ({}, {flag: True})
    )
    assert "<image></image>\n<|audio_start|><|audio_end|>\nWhat?" in plain
    assert "user\n<image></image><|audio_start|><|audio_end|>What?<|im_end|>" in joined
    film = Picture("video", (picture().size,), lambda: [picture()], sound=(Clip.of(second),))
    shown = answering_chat.chat(
        None, None, [{"role": "user", "content": [film, "What?"]}], processor=processing(name)
    )
    assert shown == (joined if name == "o4_5" else joined.replace("<image>", "<unit><image>"))


@pytest.mark.parametrize("name", WITH_GOLDENS)
def test_chat_puts_the_released_prompt_to_the_model(name):
    cases = json.loads((GOLDENS / name / "processor.json").read_text())["cases"]
    # In these two the image stands inside a line, which the released calling form can't say.
    for case in cases.keys() - {"middle", "later_turn"}:
        info = cases[case]
        system = [m["content"] for m in info["messages"] if m["role"] == "system"]
        pictures = iter([picture(each) for each in info["images"]])
        asked = [as_message(m, pictures) for m in info["messages"][:-1] if m["role"] != "system"]
        turns, images = read_messages(asked, system_prompt=system[0] if system else "")
        sample = processing(name).encode_prompt(turns, images)
        assert sample["input_ids"].tolist() == info["generation_ids"], case


def without_cache(model, name, sample, *, steps):
    """Greedy tokens, each from a forward over everything in front of it."""
    batch = data_collator([sample], padding_side="left")
    del batch["attention_mask"]
    found = []
    for _ in range(steps):
        with torch.no_grad():
            logits = model(**batch).logits
        found.append(logits[0, -1].argmax().item())
        batch["input_ids"] = torch.cat([batch["input_ids"], torch.tensor([[found[-1]]])], dim=1)
    return decode(found, rules_of(name).tokenizer, [])


@pytest.mark.parametrize("name", ALL)
def test_cache_and_batch_change_nothing(name, monkeypatch):
    model, rules = asking(name), rules_of(name)
    monkeypatch.setattr(
        "minicpm_tune.answering.generate.stop_ids", lambda _: [0]
    )  # random weights would stop by chance
    small = picture().resize((100, 80))
    prompts = [
        [{"role": "user", "content": [picture(), "What is it?"]}],
        [{"role": "user", "content": [small, small.rotate(90), "Compare the two pictures."]}],
        [{"role": "user", "content": "Hi"}],
    ]
    samples = [rules.encode_prompt(*read_messages(msgs)) for msgs in prompts]
    alone = [answer(model, rules, [sample], max_new_tokens=4, **GREEDY)[0] for sample in samples]
    assert alone[0] == without_cache(model, name, samples[0], steps=4)
    assert len(set(alone)) > 1
    assert model.chat(msgs=prompts, processor=rules, **SHORT | {"max_new_tokens": 4}) == alone


def test_the_stop_tokens_are_the_turn_end_and_the_ends_of_a_text():
    found = {
        name: processing(name).tokenizer.convert_ids_to_tokens(stop_ids(processing(name))) for name in ALL
    }
    assert found == {
        "v2": ["</s>"],
        "v2_5": ["<|end_of_text|>", "<|eot_id|>"],
        "v2_6": ["<|endoftext|>", "<|im_end|>"],
        "o2_6": ["<|endoftext|>", "<|im_end|>", "<|tts_eos|>"],
        "v4": ["</s>", "<|im_end|>"],
        "v4_5": ["<|endoftext|>", "<|im_end|>"],
        "v4_6": ["<|endoftext|>", "<|im_end|>"],
        "v4_7": ["<|endoftext|>", "<|im_end|>"],
    }


@pytest.mark.parametrize("name", ["v2_6", "v4_6"])
def test_an_answer_ends_at_the_first_stop_token(name, monkeypatch):
    model, rules = asking(name), rules_of(name)
    sample = rules.encode_prompt(*read_messages(QUESTION))
    monkeypatch.setattr("minicpm_tune.answering.generate.stop_ids", lambda _: [0])
    seen = []
    monkeypatch.setattr("minicpm_tune.answering.generate.decode", lambda ids, *_: seen.append(ids) or "")
    answer(model, rules, [sample], max_new_tokens=6, **GREEDY)
    monkeypatch.setattr("minicpm_tune.answering.generate.stop_ids", lambda _: [seen[0][3], 1])
    answer(model, rules, [sample, sample], max_new_tokens=6, **GREEDY)
    assert seen[1] == seen[2] == seen[0][:4]
    assert decode(seen[0], rules.tokenizer, [seen[0][3]]) == decode(seen[0][:3], rules.tokenizer, [])


def test_v2_scales_the_embeddings_of_new_tokens_and_leaves_no_hook():
    model = asking("v2")
    assert model.embedding_scale != 1
    model.chat(picture(), QUESTION, **SHORT)
    assert not model.get_input_embeddings()._forward_hooks


def test_a_stream_gives_the_answer():
    model = asking("v4_5")
    pieces = list(model.chat(picture(), QUESTION, stream=True, sampling=False, max_new_tokens=8))
    assert "".join(pieces) == model.chat(picture(), QUESTION, **SHORT)
    assert len(pieces) > 2


@pytest.mark.parametrize("name", ["v2", "v2_5", "v2_6", "v4", "v4_6"])
def test_pieces_of_a_stream_are_whole_characters_without_outer_space(name):
    tokenizer = processing(name).tokenizer
    text = "  two 猫\U0001f431 cats\n\nand <box>1</box>  "
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = []
    streamer = TextPieces(tokenizer, [tokenizer.eos_token_id], pieces.append)
    streamer.put(torch.tensor([[1, 2, 3]]))
    for token in [*ids, tokenizer.eos_token_id, ids[0]]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(pieces) == decode(ids, tokenizer, [])
    assert len(pieces) > 5
    assert not any(INCOMPLETE in piece for piece in pieces)


def test_a_stream_that_fails_fails_for_its_reader():
    model = asking("v2_6")
    with pytest.raises(ValueError, match="no_such_option"):
        list(model.chat(None, QUESTION, stream=True, no_such_option=3))


def test_a_reader_who_leaves_a_stream_stops_it():
    model, steps, most = asking("v2_6"), [], 500
    counter = model.llm.register_forward_hook(lambda *_: steps.append(1))
    length = {"min_new_tokens": most, "max_new_tokens": most}
    pieces = model.chat(None, QUESTION, stream=True, sampling=False, **length)
    next(pieces)
    pieces.close()
    counter.remove()
    assert 0 < len(steps) < most


# --- the released calling form ---


def test_chat_takes_the_image_beside_the_messages_or_in_them():
    model = asking("v2_6")
    tokenizer = rules_of("v2_6").tokenizer
    beside = model.chat(image=picture(), msgs=QUESTION, tokenizer=tokenizer, **SHORT)
    inside = [{"role": "user", "content": [picture(), "What is it?"]}]
    assert model.chat(image=None, msgs=inside, tokenizer=tokenizer, **SHORT) == beside
    assert model.chat(picture(), json.dumps(QUESTION), tokenizer, **SHORT) == beside
    assert model.chat(msgs=[inside, QUESTION], **SHORT)[0] == beside
    assert model.chat(None, QUESTION, tokenizer, **SHORT) != beside


def test_v2_form_with_context_gives_its_triple():
    model = asking("v2")
    text, context, options = model.chat(
        image=picture(),
        msgs=QUESTION,
        context=None,
        tokenizer=None,
        sampling=True,
        temperature=0.3,
        max_new_tokens=4,
    )
    assert context == [*QUESTION, {"role": "assistant", "content": text}]
    assert options["temperature"] == 0.3
    assert options["top_k"] == 100


def test_sampling_and_beams_are_the_released_ones(monkeypatch):
    model = asking("v2_6")
    seen = []
    monkeypatch.setattr(
        "minicpm_tune.answering.generate.answer", lambda *_, **options: seen.append(options) or ["yes"]
    )
    model.chat(None, QUESTION, temperature=None, min_new_tokens=2)
    model.chat(None, QUESTION, sampling=False, num_beams=5)
    assert seen[0] == {
        "do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 100, "repetition_penalty": 1.05,
        "max_new_tokens": 2048, "min_new_tokens": 2,
    }  # fmt: skip
    assert seen[1] == {"do_sample": False, "num_beams": 5, "repetition_penalty": 1.2, "max_new_tokens": 2048}


def prompt_of(model, monkeypatch, **options):
    seen = []
    monkeypatch.setattr(
        "minicpm_tune.answering.generate.answer",
        lambda _, __, samples, **___: seen.extend(samples) or ["yes"],
    )
    model.chat(picture("big"), QUESTION, **options)
    return seen[0]


def test_slices_image_numbers_system_prompt_and_thinking_act(monkeypatch):
    model = asking("v4_5")
    plain = prompt_of(model, monkeypatch)
    assert len(plain["tgt_sizes"]) == 10
    assert len(prompt_of(model, monkeypatch, max_slice_nums=1)["tgt_sizes"]) == 1
    number = rules_of("v4_5").tokenizer.convert_tokens_to_ids("<image_id>")
    assert number in plain["input_ids"]
    assert number not in prompt_of(model, monkeypatch, use_image_id=False)["input_ids"]
    text = rules_of("v4_5").tokenizer.decode(
        prompt_of(model, monkeypatch, system_prompt="Be brief.")["input_ids"]
    )
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    ends = [prompt_of(model, monkeypatch, enable_thinking=wish)["input_ids"][-6:] for wish in (False, True)]
    assert [rules_of("v4_5").tokenizer.decode(end).endswith("</think>\n\n") for end in ends] == [True, False]


def test_frames_with_time_indices_are_one_packed_video(monkeypatch):
    model, seen = asking("v4_5"), []
    monkeypatch.setattr(
        "minicpm_tune.answering.generate.answer",
        lambda _, __, samples, **___: seen.extend(samples) or ["yes"],
    )
    asked = [{"role": "user", "content": [picture(), picture(), picture(), "What happens?"]}]
    model.chat(msgs=asked, temporal_ids=[[0, 3], [7]])
    assert seen[0]["temporal_ids"].tolist() == [[0, 0], [0, 3], [1, 7]]
    assert len(seen[0]["image_bound"]) == 2
    with pytest.raises(MessageError, match="found 2 time indices for 3 images"):
        model.chat(msgs=asked, temporal_ids=[[0, 3]])


def test_a_tokenizer_that_encodes_otherwise_is_not_used(monkeypatch, caplog):
    model = asking("v2_6")
    other = PreTrainedTokenizerFast(tokenizer_file=str(checkpoint_folder("v4") / "tokenizer.json"))
    expected = prompt_of(model, monkeypatch)["input_ids"]
    assert torch.equal(prompt_of(model, monkeypatch, tokenizer=other)["input_ids"], expected)
    assert "encodes text differently from the checkpoint's" in caplog.text


def test_a_changed_chat_template_is_used(monkeypatch):
    model = asking("v2_6")
    tokenizer = load_processing(checkpoint("v2_6")).tokenizer
    tokenizer.chat_template = tokenizer.chat_template.replace("a helpful assistant", "a cat")
    text = tokenizer.decode(prompt_of(model, monkeypatch, tokenizer=tokenizer)["input_ids"])
    assert text.startswith("<|im_start|>system\nYou are a cat.<|im_end|>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"msgs": []}, "expected a list with at least one message"),
        ({"msgs": "no json"}, "the text is not JSON"),
        ({"msgs": [{"role": "user"}]}, r"msgs\[0\]: found .* expected"),
        (
            {"msgs": [{"role": "robot", "content": "x"}]},
            "found role 'robot', expected one of system, user, assistant",
        ),
        ({"msgs": [{"role": "assistant", "content": "x"}]}, "has role 'assistant', expected 'user'"),
        ({"msgs": [*QUESTION, {"role": "assistant", "content": "x"}]}, "the last message is the assistant's"),
        ({"msgs": [*QUESTION, {"role": "system", "content": "x"}]}, "expected at most one, in front"),
        (
            {"msgs": [{"role": "user", "content": [3]}]},
            "found int in the content, expected texts, PIL images and arrays of audio",
        ),
        (
            {"msgs": [{"role": "user", "content": [picture(), "x"]}], "image": picture()},
            "image is given and .* holds images too, expected one of the two",
        ),
        ({"msgs": QUESTION, "max_inp_length": 5}, "expected at most max_inp_length = 5"),
        ({"msgs": [QUESTION, QUESTION], "stream": True}, "holds several conversations, but image or stream"),
    ],
)
def test_messages_that_cannot_be_used_are_refused(arguments, message):
    with pytest.raises(MessageError, match=message):
        asking("v2_6").chat(**arguments)


def test_a_text_with_a_control_token_and_a_model_of_no_checkpoint_are_refused(monkeypatch):
    model = asking("v2_6")
    with pytest.raises(RowError, match="contains '<image>', which the model reads as structure"):
        model.chat(msgs=[{"role": "user", "content": "<image>\nWhat?"}])
    monkeypatch.setattr(model, "processing", None)
    monkeypatch.setattr(model.config, "name_or_path", "")
    with pytest.raises(MessageError, match="was not loaded from a checkpoint folder"):
        model.chat(msgs=QUESTION)


def test_messages_keep_the_order_of_their_parts():
    first, second = picture(), picture("wide")
    turns, images = read_messages([{"role": "user", "content": ["a", first, "b", "c", second]}])
    assert turns == [Turn("user", ("a\n", Media("image", 0), "\nb\nc\n", Media("image", 1)))]
    assert [image.sizes for image in images] == [(first.size,), (second.size,)]


# --- chat.py ---


def test_the_official_interface_answers_base64_and_json(tmp_path):
    saved_adapter(tmp_path / "adapter", "v2_6")
    asked = chat.MiniCPMVChat(str(tmp_path / "adapter"), device="cpu")
    image = chat.img2base64(IMAGES / "small.png")
    assert isinstance(image, bytes)
    answered = asked.chat({"image": image, "question": json.dumps(QUESTION)}, **SHORT)
    assert answered == asked.model.chat(image=picture(), msgs=QUESTION, **SHORT)
    parts = [{"type": "image", "pairs": image.decode()}, {"type": "text", "pairs": "What is it?"}]
    assert asked.chat({"question": json.dumps([{"role": "user", "content": parts}])}, **SHORT) == answered
    with pytest.raises(MessageError, match="the image can't be read"):
        asked.chat({"image": "not base64!", "question": json.dumps(QUESTION)})
