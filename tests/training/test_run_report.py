"""report.html of a run: what it shows, from which files, and that it never ends a run."""

import json
import logging
import re
from types import SimpleNamespace

import pytest
from PIL import Image
from transformers.trainer_callback import TrainerState

from minicpm_tune.answering.prediction_callback import ANSWERS_FILE
from minicpm_tune.output_folder import LOGS, RUN_RECORD
from minicpm_tune.training.run_report import REPORT_FILE, RunReport, examples
from support.browser import CHECK_LAYOUT, look, needs_browser

HOSTILE = '</script><img src=x onerror="1">'


def train_line(step):
    return {
        "step": step, "epoch": step / 10, "loss": 4 / step, "learning_rate": 1e-4 / step, "grad_norm": 1.0,
        "tokens_per_second": 900.0 + step, "samples_per_second": 2.0, "supervised_share": 0.2, "padding_share": 0.1,
        "peak_memory_gib": 1.5, "loss/cats.json": 3 / step, "loss/dogs.json": 2 / step,
    }  # fmt: skip


def eval_line(step):
    return {
        "step": step,
        "epoch": step / 10,
        "eval_loss": 5 / step,
        "eval_runtime": 0.5,
        "eval_anls": 1 - 5 / step,
    }


def answer(row, text, **scores):
    return {
        "row": row, "id": f"id {row} {HOSTILE}", "question": f"What? {HOSTILE}", "answer": "A cat.",
        "prediction": text, "scores": {"anls": 0.5, **scores},
    }  # fmt: skip


HISTORY = [
    line
    for step in range(1, 31)
    for line in [train_line(step), *([eval_line(step)] if step % 10 == 0 else [])]
]
STARTS = [
    {"started": "2026-01-01T10:00:00", "ended": None, "outcome": None, "command": ["python", "finetune.py"]},
    {
        "started": "2026-01-01T11:00:00", "ended": "2026-01-01T12:00:00", "outcome": "finished", "step": 30,
        "command": ["python", "finetune.py", "--output_dir", "a b"], "versions": {"torch": "2.13.0"},
        "machine": {"host": "here", "processes": 2, "gpus": ["H100", "H100"]},
        "data": {"training": [{"path": "cats.json", "rows": 1200}, {"path": "dogs.json", "rows": 90, "rows_used": 81}]},
        "arguments": {"TrainingArguments": {"learning_rate": 1e-4, "use_lora": False}, "LoraArguments": {"lora_r": 64}},
    },
]  # fmt: skip
ANSWERS = [
    {"step": 0, "answers": [answer(0, "Red"), answer(1, HOSTILE)]},
    {"step": 10, "answers": [answer(row, "A dog.") for row in range(20)]},
    {"step": 30, "answers": [answer(row, "A cat.", anls=1.0) for row in range(20)]},
]


def state(history=HISTORY, **more):
    return TrainerState(
        log_history=history, global_step=30, max_steps=30, epoch=3.0, is_world_process_zero=True, **more
    )


def write(folder, *, history=HISTORY, starts=STARTS, answers=ANSWERS, picture=lambda row: None):
    (folder / LOGS).mkdir(parents=True, exist_ok=True)
    (folder / RUN_RECORD).write_text(json.dumps({"starts": starts}))
    (folder / LOGS / ANSWERS_FILE).write_text(
        "".join(json.dumps(each) + "\n" for each in answers) + '{"step": 4'
    )
    RunReport(SimpleNamespace(picture=picture)).write(SimpleNamespace(output_dir=str(folder)), state(history))
    return (folder / REPORT_FILE).read_text(encoding="utf-8")


def titles(page):
    return re.findall(r"<figcaption><strong>(.*?)</strong>", page)


def test_a_page_shows_curves_figures_answers_and_what_the_run_was_made_of(tmp_path):
    page = write(tmp_path, picture=lambda row: Image.new("RGB", (900, 300)) if row == 0 else None)
    assert titles(page) == [
        "Loss (nats per supervised token)", "Learning rate", "Gradient norm", "Tokens per second", "Shares (%)",
        "Peak memory (GiB)", "Loss by data file", "Evaluation: anls",
    ]  # fmt: skip
    assert "<dd>0.138<small>mean of the last 3 of 30 log lines; 4 at first</small>" in page
    assert "<dd>0.1667<small>the best is 0.1667, at step 30</small>" in page
    assert "<dd>915.5<small>median; 2 rows per second</small>" in page
    assert "<strong>finished</strong>, step 30 of 30, epoch 3.00" in page
    assert page.count("<article") == 12
    assert page.count('src="data:image/webp;base64,') == 1
    assert page.index("before training") < page.index("step 30</dt>")
    for text in (
        "cut off",
        "2 x H100",
        "1,200 of cats.json; 81 of the 90 of dogs.json",
        "finetune.py --output_dir &#39;a b&#39;",
        "2.13.0",
    ):
        assert text in page, text
    assert "<dt>--lora_r</dt>" not in page  # the run had no adapter


def test_examples_hold_the_first_and_the_last_answer_of_a_row():
    [first, *_, last] = examples(ANSWERS, picture=lambda row: f"picture {row}")
    assert (first["before"][0], first["before"][1]["prediction"]) == (0, "Red")
    assert (first["after"][0], first["after"][1]["prediction"], first["picture"]) == (
        30,
        "A cat.",
        "picture 0",
    )
    assert last["before"][0] == 10
    [once] = examples(ANSWERS[:1], picture=lambda row: None)[:1]
    assert once["before"] is None


def test_nothing_of_an_answer_becomes_markup(tmp_path):
    page = write(tmp_path)
    assert HOSTILE not in page
    assert page.count("<script>") == page.count("</script>") == 1
    assert "&lt;/script&gt;&lt;img src=x" in page


@pytest.mark.parametrize("history", [[], [{"step": 1, "loss": float("nan"), "grad_norm": float("inf")}]])
def test_a_run_that_has_logged_nothing_yet_has_a_page(tmp_path, history):
    page = write(tmp_path, history=history, starts=[], answers=[])
    assert "Nothing has been logged yet" in page
    assert "No row was answered in this run" in page
    assert titles(page) == []


def test_a_page_that_can_not_be_written_is_logged_and_ends_nothing(tmp_path, caplog):
    (tmp_path / REPORT_FILE).mkdir()
    with caplog.at_level(logging.WARNING):
        RunReport(None).write(SimpleNamespace(output_dir=str(tmp_path)), state())
    assert re.search(r"report.html was not written: .*found a folder, expected a file", caplog.text)
    caplog.clear()

    def gone(row):
        raise OSError("gone")

    (tmp_path / "other").mkdir()
    assert "<article" in write(tmp_path / "other", picture=gone)
    with caplog.at_level(logging.WARNING):
        broken = state([{"step": "seven", "loss": 1.0}])
        RunReport(None).write(SimpleNamespace(output_dir=str(tmp_path / "other")), broken)
    assert "report.html was not written" in caplog.text


def test_only_the_first_process_writes(tmp_path):
    other = state()
    other.is_world_process_zero = False
    RunReport(None).write(SimpleNamespace(output_dir=str(tmp_path)), other)
    assert list(tmp_path.iterdir()) == []


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1600])
def test_numbers_show_under_the_pointer_and_nothing_is_too_wide(tmp_path, width):
    found = look(
        tmp_path,
        write(tmp_path / "run"),
        """
        const area = document.querySelector("div.area");
        const box = area.getBoundingClientRect();
        const place = { clientX: box.left + box.width / 3, clientY: box.top + 5 };
        area.dispatchEvent(new PointerEvent("pointermove", place));
        report({ tip: area.querySelector(".tip").textContent, inside: innerWidth,
                 wide: document.documentElement.scrollWidth, refused });
        """,
        width=width,
    )
    assert found["tip"] == "step 10\ntraining 0.4\ntraining, running mean 1.17159\nevaluation 0.5"
    assert found["wide"] <= found["inside"] <= width
    assert found["refused"] == []


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_texts_stand_out_and_controls_have_names(tmp_path, dark):
    page = write(tmp_path / "run", picture=lambda row: Image.new("RGB", (90, 30)))
    found = look(tmp_path, page, CHECK_LAYOUT, dark=dark)
    assert (found["weak"], found["unnamed"]) == ([], 0)
