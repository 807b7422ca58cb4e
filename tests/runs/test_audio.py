"""MiniCPM-o on rows with audio, images and text alone: real runs, equal however the work is split, and chat."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import chat
import merge_lora
import predict
from dataset import SupervisedDataset, data_collator
from minicpm_tune.answering.load import ModelChoice, load_for_inference
from minicpm_tune.lora.adapter_folders import read_adapter_folder
from support import finetune_runs, live_runs
from support.films import write_film
from support.live_runs import FSDP, LORA, LOSS_TOLERANCE, NORM_TOLERANCE, STAGES
from support.paths import GOLDENS, IMAGES
from support.rows import chat as talk
from support.rows import write_rows

pytestmark = pytest.mark.slow
OMNI = ("o2_6", "o4_5")
WAVES = ("speech", None, "half", "one")
TUNED = ("--tune_audio", "true")
MERGE_TOLERANCE = 1e-4  # of a token's loss


@pytest.fixture(scope="module", params=OMNI)
def place(request, tmp_path_factory):
    """A model, and rows: audio alone, an image, audio, audio and an image."""
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


def train(folder, place, *flags, **kwargs):
    model, data = place
    return finetune_runs.train(folder, *flags, model=model, data=data, **kwargs)


def close(found, expected):
    assert len(found) == len(expected)
    for own, wanted in zip(found, expected, strict=True):
        assert own["loss"] == pytest.approx(wanted["loss"], rel=LOSS_TOLERANCE)
        assert own["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=NORM_TOLERANCE)


def test_losses_do_not_depend_on_how_the_rows_are_put_together(place, tmp_path):
    expected = train(tmp_path, place, *TUNED, batch=4)
    for split in ({"batch": 1, "accumulation": 4}, {"batch": 2, "accumulation": 1, "processes": 2}):
        close(train(tmp_path, place, *TUNED, **split), expected)
    packed = ("--packing", "true", "--model_max_length", "4096")
    close(train(tmp_path, place, *TUNED, *packed, batch=1)[:1], expected[:1])


@pytest.mark.parametrize("kind", [TUNED, (*LORA, "--lora_dropout", "0")], ids=["full", "lora"])
def test_losses_do_not_depend_on_how_the_model_is_divided(place, tmp_path, kind):
    expected = train(tmp_path, place, *kind, batch=4)
    # One process hears while the other looks or reads: what one of them lacks must not stop the other.
    for division in (STAGES["zero2"], STAGES["zero3"], FSDP):
        close(train(tmp_path, place, *kind, *division, batch=1, accumulation=2, processes=2), expected)


def test_an_adapter_trains_the_projection_and_leaves_the_encoder(place, tmp_path):
    train(tmp_path, place, *LORA)
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any("audio_projection_layer" in name for name in adapter)
    assert not any(".apm." in name for name in adapter)


def test_a_4_bit_run_hears_with_exact_weights(place, tmp_path):
    """Its losses are near those of a run in full precision; the quantized LLM alone makes the difference."""
    adapter = (*LORA, "--lora_dropout", "0")
    expected = train(tmp_path / "exact", place, *adapter)
    found = train(tmp_path / "4bit", place, *adapter, "--q_lora", "true")
    assert found[0]["loss"] == pytest.approx(expected[0]["loss"], rel=0.05)
    close(train(tmp_path, place, *adapter, "--q_lora", "true", batch=1, accumulation=4), found)


def test_new_tokens_are_learned_beside_a_4_bit_llm(place, tmp_path):
    (tmp_path / "tokens.txt").write_text("<new_a>\n<new_b>\n")
    model, data = place
    rows = json.loads(data.read_text())
    for number, row in enumerate(rows):
        row["messages"][1]["content"] = ("<new_a>", "<new_b>")[number % 2]
    renamed = data.with_name("tokens.json")
    renamed.write_text(json.dumps(rows))
    flags = ("--q_lora", "true", "--new_tokens", tmp_path / "tokens.txt", "--learning_rate", "1e-2")
    found = train(tmp_path, (model, renamed), *LORA, *flags, steps=30)
    assert found[-1]["loss"] < found[0]["loss"] / 4
    adapter = read_adapter_folder(tmp_path / "out")
    assert list(adapter.new_tokens) == ["<new_a>", "<new_b>"]
    _, processing = load_for_inference(ModelChoice(adapter=str(tmp_path / "out"), device="cpu"))
    assert processing.tokenizer.convert_tokens_to_ids("<new_b>") == adapter.new_tokens["<new_b>"]


def files_of(folder):
    return load_file(folder / "model.safetensors")


def test_a_full_run_saves_what_it_tuned_and_carries_the_rest(place, tmp_path):
    model, _ = place
    train(tmp_path, place, *TUNED)
    before, after = files_of(model), files_of(tmp_path / "out")
    assert after.keys() == before.keys()
    moved = {name for name in before if not before[name].equal(after[name])}
    heard = {name for name in before if name.startswith(("apm.", "audio_projection_layer."))}
    # Keys of attention have a bias of nothing; positions never train.
    assert heard - moved == {"apm.embed_positions.weight"}
    assert not any(name.startswith("tts.") for name in moved)
    assert answer(tmp_path / "out") == 0


def test_a_merged_adapter_hears_as_the_adapter_does(place, tmp_path):
    model, data = place
    train(tmp_path, place, *LORA, "--learning_rate", "1e-2")
    words = ["--adapter", tmp_path / "out", "--output_dir", tmp_path / "merged"]
    merge_lora.run(merge_lora.parse_flags([str(word) for word in words]))
    before, after = files_of(model), files_of(tmp_path / "merged")
    assert after.keys() == before.keys()
    carried = [name for name in before if name.startswith(("apm.", "tts."))]
    assert carried
    assert all(before[name].equal(after[name]) for name in carried)
    expected = token_losses(data, adapter=str(tmp_path / "out"))
    assert (expected - token_losses(data, model_name_or_path=str(model))).abs().max() > 0.1
    found = token_losses(data, model_name_or_path=str(tmp_path / "merged"))
    torch.testing.assert_close(found, expected, atol=MERGE_TOLERANCE, rtol=0)


def token_losses(data, **choice):
    """What every supervised token of the rows costs a model."""
    model, processing = load_for_inference(ModelChoice(device="cpu", dtype="fp32", **choice))
    rows = SupervisedDataset(str(data), processing)
    batch = data_collator([rows[number] for number in range(len(rows))])
    del batch["provenance"]
    with torch.no_grad():
        return model(**batch).token_losses


def answer(model):
    words = ("--audio", GOLDENS / "audio" / "one.wav", "--question", "What is it?", "--max_new_tokens", 3)
    return chat.main([str(word) for word in ("--model_name_or_path", model, *words)])


def test_chat_hears(place, capfd):
    model, _ = place
    assert answer(model) == 0
    assert "error" not in capfd.readouterr().out


def test_a_film_is_trained_and_asked_with_its_sound(place, tmp_path, capfd):
    """chat.py, and predict.py on a row, give the model what training gives it; the released calling form does, too."""
    model, _ = place
    write_film(tmp_path / "a.mkv")
    question, answer = "What happens?", "A tone."
    data = write_rows(
        tmp_path, [{"video": "a.mkv", "use_audio": True, "conversations": talk(f"<video>{question}", answer)}]
    )
    [step] = finetune_runs.train(
        tmp_path, "--tune_audio", "true", model=model, data=data, batch=1, accumulation=1, steps=1
    )
    assert step["loss"] > 0
    common = ("--model_name_or_path", model, "--max_new_tokens", "3", "--device", "cpu")
    asked = (
        "--video",
        tmp_path / "a.mkv",
        "--video_sound",
        "true",
        "--sampling",
        "false",
        "--question",
        question,
    )
    assert chat.main([str(word) for word in (*common, *asked)]) == 0
    shown = capfd.readouterr().out.strip()
    output = tmp_path / "out.jsonl"
    words = (*common, "--data_path", data, "--output", output)
    assert predict.main([str(word) for word in words]) == 0
    line = json.loads(output.read_text())
    assert line["prediction"].strip() == shown
    assert line["edits"].keys() == {"wer", "cer"}
