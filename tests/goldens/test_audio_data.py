"""Samples with audio against the released processors of MiniCPM-o: ids, bounds, frames, and what is heard together."""

import json
from dataclasses import replace

import pytest
import torch

from dataset import SupervisedDataset
from minicpm_tune.data.media.audio import AudioRules
from minicpm_tune.data.sample_tensors import data_collator
from minicpm_tune.errors import RowError
from support.golden_checkpoints import processing
from support.golden_models import HEARING
from support.paths import GOLDENS, IMAGES
from support.rows import write_rows

AUDIO = GOLDENS / "audio"


def golden_cases(name):
    return json.loads((GOLDENS / name / "processor.json").read_text(encoding="utf-8"))["cases"]


CASES = [(name, case) for name in HEARING for case in golden_cases(name)]


def row_of(case):
    return {
        "messages": case["messages"],
        "images": [str(IMAGES / f"{image}.png") for image in case["images"]],
        "audios": [str(AUDIO / f"{name}.wav") for name in case["audios"]],
    }


def prepared(name, case, **arguments):
    """The golden checkpoint's processing, with what the released chat was called with."""
    found = processing(name, **arguments)
    options = case.get("options") or {}
    media = found.media
    if "max_slice_nums" in options:
        media = replace(media, slicing=media.slicing.limited(options["max_slice_nums"]))
    if "use_image_id" in options:
        media = replace(media, style=replace(media.style, image_ids=options["use_image_id"]))
    for option in ("chunk_input", "stream_input"):
        if option in options:
            media = replace(media, audio=AudioRules(media.audio.pool, per_second=options[option]))
    return replace(found, media=media)


@pytest.mark.parametrize(("name", "case_name"), CASES)
def test_a_training_row_is_the_released_prompt_and_the_answer(name, case_name, tmp_path):
    case = golden_cases(name)[case_name]
    rules = prepared(name, case)
    sample = SupervisedDataset(write_rows(tmp_path, [row_of(case)]), rules)[0]
    prompt = case["generation_ids"]
    assert sample["input_ids"][: len(prompt)].tolist() == prompt
    answer = case["messages"][-1]["content"] + "<|im_end|>\n"
    assert rules.tokenizer.decode(sample["input_ids"][len(prompt) :]) == answer
    assert sample["tgt_sizes"].tolist() == case["tgt_sizes"]
    assert sample["image_bound"].tolist() == case["image_bound"]
    if not case["audios"]:
        assert "audio_values" not in sample
        return
    assert sample["audio_bound"].tolist() == case["audio_bounds"]
    assert sample["audio_segments"][:, 0].tolist() == case["audio_feature_lens"]
    assert sample["audio_segments"][:, 2].sum() == sum(end - start for start, end in case["audio_bounds"])
    assert sample["audio_values"].shape == (80, sum(case["audio_feature_lens"]))


@pytest.mark.parametrize(
    ("name", "case_name"), [(n, c) for n, c in CASES if "plain_generation_ids" in golden_cases(n)[c]]
)
def test_the_plain_form_is_what_servers_send(name, case_name, tmp_path):
    case = golden_cases(name)[case_name]
    rules = prepared(name, case, audio_prompt="plain")
    sample = SupervisedDataset(write_rows(tmp_path, [row_of(case)]), rules)[0]
    expected = case["plain_generation_ids"]
    assert sample["input_ids"][: len(expected)].tolist() == expected


def audio_row(*names, text="<audio>Which?"):
    return {
        "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "A."}],
        "audios": [str(AUDIO / f"{name}.wav") for name in names],
    }


def test_audio_that_would_have_too_few_tokens_is_heard_one_by_one(tmp_path):
    """43 + 43 frames: 21 tokens as one waveform, 22 places; the released code raises."""
    waves = [{"array": [0.0] * (43 * 160), "sampling_rate": 16_000}] * 2
    row = audio_row(text="<audio><audio>Which?") | {"audios": waves}
    sample = SupervisedDataset(write_rows(tmp_path, [row]), processing("o2_6_audio"))[0]
    assert sample["audio_segments"].tolist() == [[43, 43, 11], [43, 43, 11]]


def test_a_batch_has_the_audio_of_all_samples_side_by_side(tmp_path):
    two = audio_row("short", "half", text="<audio>\n<audio>Which?")
    rows = [audio_row("one"), audio_row(text="Which?"), two]
    dataset = SupervisedDataset(write_rows(tmp_path, rows), processing("o4_5"))
    first, silent, last = samples = [dataset[index] for index in range(3)]
    batch = data_collator([samples], packing=True)
    torch.testing.assert_close(
        batch["audio_values"], torch.cat([first["audio_values"], last["audio_values"]], 1)
    )
    expected = torch.cat([first["audio_segments"], last["audio_segments"]])
    assert batch["audio_segments"].tolist() == expected.tolist()
    before = len(first["input_ids"]) + len(silent["input_ids"])
    expected = torch.cat([first["audio_bound"], last["audio_bound"] + before])
    assert batch["audio_bound"].tolist() == [[0, *bound] for bound in expected.tolist()]


def test_audio_too_short_for_a_token_is_a_bad_row_with_the_numbers(tmp_path):
    row = audio_row() | {"audios": [{"array": [0.0] * 320, "sampling_rate": 16_000}]}
    dataset = SupervisedDataset(write_rows(tmp_path, [row]), processing("o2_6_audio"))
    with pytest.raises(RowError, match=r"has 320 samples of 16 kHz, expected at least 321"):
        dataset.plan(0)


def test_a_cut_row_keeps_whole_audios(tmp_path):
    row = audio_row("speech", "half", text="<audio>\nWhat?") | {"audios": [str(AUDIO / "speech.wav")] * 2}
    row["messages"] += [{"role": "user", "content": "<audio>And?"}, {"role": "assistant", "content": "B."}]
    rules = processing("o4_5")
    rules = replace(rules, arguments=replace(rules.arguments, model_max_length=60))
    sample = SupervisedDataset(write_rows(tmp_path, [row]), rules)[0]
    assert len(sample["input_ids"]) <= 60
    assert sample["audio_bound"].tolist() == [[4, 27]]
    assert sample["audio_segments"].tolist() == [[233, 233, 23]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (audio_row(), "<audio> for audio number 1, but the row has no audio"),
        (
            audio_row("one") | {"audio_path": "a.wav"},
            "'audio_path', expected its audio under 'audio' or 'audios'",
        ),
        (audio_row("gone"), r"gone\.wav"),
    ],
)
def test_rows_whose_audio_is_not_clear_are_bad_rows(row, message, tmp_path):
    dataset = SupervisedDataset(write_rows(tmp_path, [row]), processing("o4_5"))
    with pytest.raises(RowError, match=message):
        dataset.plan(0)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "audio", "path": "P"},
        {"type": "audio_url", "audio_url": {"url": "P"}},
        {"type": "audio", "index": 0},
    ],
)
def test_parts_of_every_accepted_form_name_their_audio(part, tmp_path):
    path = str(AUDIO / "one.wav")
    part = json.loads(json.dumps(part).replace('"P"', json.dumps(path)))
    content = [{"type": "audio", "audio": path}, {"type": "text", "text": "Which?"}]

    def ids(content):
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "A."}]
        row = {"messages": messages} | ({"audios": [path]} if "index" in content[0] else {})
        return SupervisedDataset(write_rows(tmp_path, [row]), processing("o4_5"))[0]["input_ids"].tolist()

    assert ids([part, content[1]]) == ids(content)
