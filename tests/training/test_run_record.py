"""What a run leaves about itself: run.json, loss.png, and where its numbers are reported."""

import hashlib
import json
import logging
import math
import os

import pytest
from PIL import Image
from transformers import TrainerState, TrainingArguments

from minicpm_tune.data.bad_rows import BadRow, BadRowLog
from minicpm_tune.settings.arguments import parse_arguments
from minicpm_tune.training import run_record
from minicpm_tune.training.run_record import RunRecord
from minicpm_tune.training.step_metrics import CURVE_FILE, LossCurve, draw_losses
from support import finetune_runs, live_runs
from support.live_runs import LORA


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def entry(folder):
    return json.loads((folder / "run.json").read_text())["starts"]


def test_a_run_on_two_processes_can_be_repeated_from_its_record(tmp_path):
    model, data = live_runs.tiny(tmp_path / "model"), live_runs.uneven_rows(tmp_path / "data")
    output = tmp_path / "out"
    flags = live_runs.flags(model, data, output, *LORA, "--report_to", "tensorboard")
    printed = live_runs.finish(flags, processes=2)
    # Into a file, as here: a line per step, no bars, and what is said of parameters once.
    assert [printed.count(f"step {step}: {{'loss'") for step in (1, 2, 3, 4)] == [1, 1, 1, 1]
    assert "%|" not in printed
    assert printed.count("'Trainable'") == 1
    (start,) = entry(output)
    assert start["outcome"] == "finished"
    assert start["step"] == 4
    assert start["command"][1:3] == [str(finetune_runs.FINETUNE), "--model_name_or_path"]
    assert start["versions"].keys() >= {"python", "torch", "transformers", "peft", "deepspeed"}
    assert start["machine"]["processes"] == 2
    assert start["arguments"]["LoraArguments"]["lora_r"] == 4
    assert start["arguments"]["TrainingArguments"]["learning_rate"] == 1e-3
    (file,) = start["data"]["training"]
    assert file["path"] == str(data)
    assert file["rows"] == 7
    assert file["sha256"] == hashlib.sha256(data.read_bytes()).hexdigest()
    assert Image.open(output / CURVE_FILE).size[0] > 500
    assert list((output / "runs").rglob("events*"))
    for folder in (output, output / "checkpoint-4"):
        modes = {
            (folder / name).stat().st_mode & 0o777 for name in ("adapter_model.safetensors", "README.md")
        }
        assert modes == {0o666 & ~umask()}
        card = (folder / "README.md").read_text()
        assert card.startswith(
            "---\nlibrary_name: peft\n"
        )  # the base is a folder, which a hub has no link to
        assert "# LoRA adapter of model\n\nTrained for 4 steps (1.00 epochs) on\n" in card
        assert "| uneven.json | 7 | 7 |" in card
        assert "| rank, alpha, dropout | 4, 64, 0.05 |" in card
        assert "| learning rate | 0.001, cosine |\n| rows in a step | 2 |" in card
        loss = json.loads((folder / "trainer_state.json").read_text())["log_history"][3]["loss"]
        assert f"| training loss | {loss:.4g} (step 4) |" in card
    first, second = ((output / "logs" / f"rank{rank}.log").read_text() for rank in (0, 1))
    for log in (first, second):
        assert [log.count(f"step {step}: {{'loss'") for step in (1, 2, 3, 4)] == [1, 1, 1, 1]


def test_each_start_adds_an_entry_and_a_broken_record_is_replaced(tmp_path):
    (tmp_path / "run.json").write_text('{"starts"')
    for outcome in ("stopped", "finished"):
        record = RunRecord(tmp_path, ["--seed", "1"])
        record.add(arguments={})
        record.end(outcome)
    assert [start["outcome"] for start in entry(tmp_path)] == ["stopped", "finished"]


class FullDisk:
    def write_text(self, *_, **__):
        raise OSError(28, "No space left on device")


def test_a_full_disk_ends_no_run_for_the_record_or_the_list_of_bad_rows(tmp_path, monkeypatch, caplog):
    record = RunRecord(tmp_path, [])
    monkeypatch.setattr(run_record.Path, "with_name", lambda *_: FullDisk())
    record.add(arguments={})
    assert "run.json was not written: [Errno 28] No space left on device" in caplog.text
    monkeypatch.undo()
    record.add(arguments={})
    assert entry(tmp_path)[0]["arguments"] == {}
    (tmp_path / "bad_rows.jsonl").symlink_to("/dev/full")
    BadRowLog(tmp_path / "bad_rows.jsonl").add(BadRow("a.json", 3, None, "image", "cut off"))
    assert "a.json: row 3: cut off" in caplog.text


def test_a_line_that_a_full_disk_cut_short_is_passed_over(tmp_path):
    log = BadRowLog(tmp_path / "bad_rows.jsonl")
    log.add(BadRow("a.json", 3, None, "image", "cut off"))
    with log.path.open("a") as file:
        file.write('{"file": "a.js')
    assert [row["row"] for row in log.read()] == [3]


def test_the_curve_is_drawn_of_what_is_finite_and_kept_current(tmp_path, monkeypatch):
    draw_losses([{"step": 1, "loss": math.nan}], tmp_path / CURVE_FILE)  # nothing to draw is no error
    drawn = []
    monkeypatch.setattr(
        "minicpm_tune.training.step_metrics.draw_losses", lambda history, path: drawn.append(len(history))
    )
    curve, training = LossCurve(), TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    state = TrainerState(is_world_process_zero=True)
    for step in range(3):
        state.log_history.append({"step": step, "loss": 1.0})
        curve.on_log(training, state, None)
    assert drawn == [1]  # at most every half minute
    curve.on_train_end(training, state, None)
    assert drawn == [1, 3]


@pytest.mark.parametrize("names", [["tensorboard"], ["none"]])
def test_where_to_report_passes_through(tmp_path, names):
    data = finetune_runs.write_data(tmp_path / "data", rows=1)
    (tmp_path / "config.json").write_text("{}")
    words = [
        "--model_name_or_path",
        str(tmp_path),
        "--data_path",
        str(data),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    training = parse_arguments([*words, "--report_to", *names])[2]
    assert training.report_to == ([] if names == ["none"] else names)


def test_trusting_code_is_not_needed(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    data = finetune_runs.write_data(tmp_path / "data", rows=1)
    (tmp_path / "config.json").write_text("{}")
    words = [
        "--model_name_or_path",
        str(tmp_path),
        "--data_path",
        str(data),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    parse_arguments([*words, "--trust_remote_code", "true"])
    assert "--trust_remote_code true is left out: no code of a model folder is needed here" in caplog.text
