"""Real runs on a table: ``--columns``, ``--eval_split`` and weights, divided, resumed and stored in run.json."""

import csv
import json
import shutil

import pytest

from support import finetune_runs, live_runs

pytestmark = pytest.mark.slow

COLUMNS = {"picture": "image", "prompt": "user", "reply": "assistant", "score": "weight"}
FLAGS = (
    "--columns", json.dumps(COLUMNS), "--eval_split", 0.3, "--eval_strategy", "steps", "--eval_steps", 2,
)  # fmt: skip


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A small checkpoint, and a CSV file with two rows for each of eight pictures."""
    folder = tmp_path_factory.mktemp("table")
    model = live_runs.tiny(folder / "model")
    rows = json.loads(finetune_runs.write_data(folder / "data", text_only=()).read_text())
    path = folder / "data" / "table.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*COLUMNS, "license"])
        for number, row in enumerate(rows):
            question, answer = (message["content"] for message in row["conversations"])
            writer.writerow([row["image"], question, answer, 0.5, "MIT"])
            writer.writerow([row["image"], "And now?", f"{answer} {number}", "", "MIT"])
    return {"model": model, "data": path}


def evaluations(output):
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [(line["eval_loss"], line["eval_supervised_tokens"]) for line in history if "eval_loss" in line]


def started(output):
    return json.loads((output / "run.json").read_text())["starts"]


def test_a_table_with_held_out_rows_is_one_run_however_it_is_divided_and_after_a_resume(table, tmp_path):
    for name in ("one", "two", "packed", "resumed"):
        (tmp_path / name).mkdir()
    one = finetune_runs.train(tmp_path / "one", *FLAGS, **table, batch=4, steps=4, launcher=False)
    found = evaluations(tmp_path / "one" / "out")
    assert len(found) == 2
    two = finetune_runs.train(tmp_path / "two", *FLAGS, **table, batch=2, steps=4, processes=2)
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=2e-5)
    for mine, wanted in zip(evaluations(tmp_path / "two" / "out"), found, strict=True):
        assert mine == pytest.approx(wanted, rel=2e-5)

    (record,) = started(tmp_path / "one" / "out")
    (training,), (evaluation,) = record["data"]["training"], record["data"]["evaluation"]
    assert training["rows"] == evaluation["rows"] == 16
    assert training["rows_used"] + evaluation["rows_used"] == 16
    assert evaluation["rows_used"] in range(2, 15, 2)  # both rows of every picture
    assert record["arguments"]["DataArguments"]["eval_split"] == 0.3
    digests = [
        start["row_numbers_sha256"] for name in ("one", "two") for start in started(tmp_path / name / "out")
    ]
    assert digests[0] == digests[1]
    assert digests[0]["training"] != digests[0]["evaluation"]

    shutil.copytree(tmp_path / "one" / "out", tmp_path / "resumed" / "out")
    halves = ("--save_strategy", "steps", "--save_steps", 2)
    finetune_runs.train(tmp_path / "resumed", *FLAGS, *halves, **table, steps=4, launcher=False)
    shutil.rmtree(tmp_path / "resumed" / "out" / "checkpoint-4")
    finished = finetune_runs.run(
        [
            "--model_name_or_path", table["model"], "--data_path", table["data"],
            "--output_dir", tmp_path / "resumed" / "out", "--max_steps", 4, "--per_device_train_batch_size", 4,
            "--learning_rate", "1e-3", "--lr_scheduler_type", "constant", "--logging_steps", 1, "--report_to", "none",
            "--seed", 7, "--resume_from_checkpoint", "true", *FLAGS, *halves,
        ],
        launcher=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    for mine, wanted in zip(evaluations(tmp_path / "resumed" / "out"), found, strict=True):
        assert mine == pytest.approx(wanted, rel=2e-5)
    assert started(tmp_path / "resumed" / "out")[-1]["row_numbers_sha256"] == digests[0]


def test_held_out_rows_with_packing_grouping_predictions_and_few_rows(table, tmp_path):
    packed = ("--packing", "true", "--predict_with_generate", "true", "--generation_max_new_tokens", 2)
    few = ("--max_samples", 10, "--eval_max_samples", 1)
    finetune_runs.train(tmp_path, *FLAGS, *packed, *few, **table, batch=1, steps=2, launcher=False)
    (record,) = started(tmp_path / "out")
    (training,), (evaluation,) = record["data"]["training"], record["data"]["evaluation"]
    assert training["rows"] == 10
    assert evaluation["rows_used"] == 1
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert any("eval_exact_match" in line or "eval_anls" in line for line in history)
    grouped = ("--train_sampling_strategy", "group_by_length")
    finetune_runs.train(tmp_path, *FLAGS, *grouped, **table, batch=2, steps=2, launcher=False)
