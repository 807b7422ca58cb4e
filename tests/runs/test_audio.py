"""MiniCPM-o on rows with audio, images and text alone: real runs, equal however the work is split, and chat."""

import json
import shutil

import pytest
from safetensors.torch import load_file

import chat
from support import finetune_runs, live_runs
from support.live_runs import LORA, LOSS_TOLERANCE, NORM_TOLERANCE
from support.paths import GOLDENS, IMAGES

pytestmark = pytest.mark.slow
OMNI = ("o2_6", "o4_5")
WAVES = ("speech", None, "half", "one")


@pytest.fixture(scope="module", params=OMNI)
def place(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    rows = []
    for number, wave in enumerate(WAVES):
        image = number % 2
        text = ("<audio>\n" if wave else "") + ("<image>\n" if image else "") + "What is it?"
        turns = [
            {"role": "user", "content": text},
            {"role": "assistant", "content": "A cat. " * (number + 1)},
        ]
        row = {"messages": turns}
        if wave:
            shutil.copy(GOLDENS / "audio" / f"{wave}.wav", folder)
            row["audios"] = [f"{wave}.wav"]
        if image:
            shutil.copy(IMAGES / "small.png", folder)
            row["images"] = ["small.png"]
        rows.append(row)
    data = folder / "rows.json"
    data.write_text(json.dumps(rows))
    return live_runs.tiny(folder / "model", request.param), data


def close(found, expected):
    assert len(found) == len(expected)
    for own, wanted in zip(found, expected, strict=True):
        assert own["loss"] == pytest.approx(wanted["loss"], rel=LOSS_TOLERANCE)
        assert own["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=NORM_TOLERANCE)


def test_losses_do_not_depend_on_how_the_rows_are_put_together(place, tmp_path):
    model, data = place
    full = ("--tune_audio", "true")
    expected = finetune_runs.train(tmp_path, *full, model=model, data=data, batch=4, accumulation=1)
    for split in (
        {"batch": 1, "accumulation": 4},
        {"batch": 2, "accumulation": 1, "processes": 2},
    ):
        close(finetune_runs.train(tmp_path, *full, model=model, data=data, **split), expected)
    packed = ("--packing", "true", "--model_max_length", "4096")
    close(finetune_runs.train(tmp_path, *full, *packed, model=model, data=data, batch=1)[:1], expected[:1])


def test_an_adapter_trains_the_projection_and_leaves_the_encoder(place, tmp_path):
    model, data = place
    finetune_runs.train(tmp_path, *LORA, model=model, data=data)
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any("audio_projection_layer" in name for name in adapter)
    assert not any(".apm." in name for name in adapter)


def test_chat_hears(place, tmp_path, capfd):
    model, _ = place
    wave = GOLDENS / "audio" / "one.wav"
    words = [
        "--model_name_or_path",
        model,
        "--audio",
        wave,
        "--question",
        "What is it?",
        "--max_new_tokens",
        "3",
    ]
    assert chat.main(list(map(str, words))) == 0
    assert "error" not in capfd.readouterr().out
