"""Answers during a run: which rows, their metrics, and what TensorBoard shows."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from dataset import SupervisedDataset, data_collator
from minicpm_tune.answering.prediction import PredictionRows
from minicpm_tune.answering.prediction_callback import PredictionCallback, read_answers
from minicpm_tune.data.samples import load_processing
from support.prediction_rows import TOKENS, expected_predictions, rows
from support.rows import chat, write_rows
from support.tiny_checkpoints import checkpoint, loaded


@pytest.fixture
def data(tmp_path):
    return write_rows(tmp_path, rows())


class Trained(TrainerCallback):
    """Keeps what the trainer logs."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def small_trainer(data, folder):
    rules = load_processing(checkpoint("v2_6"))
    data_rows = SupervisedDataset(data, rules)

    def collate(samples):
        batch = data_collator(samples)
        return {name: value for name, value in batch.items() if name != "provenance"}

    trainer = Trainer(
        model=loaded(checkpoint("v2_6"), "v2_6").train(),
        args=TrainingArguments(
            folder, use_cpu=True, report_to=["tensorboard"], prediction_loss_only=True,
            label_names=["labels"], remove_unused_columns=False, per_device_eval_batch_size=2,
        ),
        eval_dataset=data_rows, data_collator=collate,
    )  # fmt: skip
    return trainer, PredictionRows(data_rows)


def test_an_evaluation_answers_rows_and_shows_them_in_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    data = write_rows(tmp_path, [row for row in rows() if len(row["conversations"]) > 1])
    trainer, asked = small_trainer(data, tmp_path / "out")
    callback = PredictionCallback(trainer, asked, samples=3, batch_size=2, max_new_tokens=TOKENS)
    assert callback.indices == [0, 1, 2]
    trainer.add_callback(callback)
    trainer.add_callback(kept := Trained())
    metrics = trainer.evaluate()
    trainer.model.train()
    lines = callback.answers()
    assert trainer.model.training
    assert [line["prediction"] for line in lines] == expected_predictions()[:3]
    expected = np.mean([line["scores"]["rouge_l"] for line in lines])
    assert metrics["eval_rouge_l"] == pytest.approx(expected)
    assert any(line.get("eval_exact_match") == 0 for line in kept.logs)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [folder] = {path.parent for path in (tmp_path / "runs").rglob("events.*")}
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    assert "pictures/0" in events.Tags()["images"]
    assert "pictures/1" not in events.Tags()["images"]  # a row without
    text = events.Tensors("predictions/1/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "How many cats are there?" in text
    assert lines[1]["prediction"].split("\n")[0] in text
    assert read_answers(tmp_path / "out") == [{"step": 0, "answers": lines}]


def test_rows_are_spread_over_the_file_and_shared_out(tmp_path, monkeypatch):
    asked = PredictionRows(
        SupervisedDataset(write_rows(tmp_path, rows() * 2), load_processing(checkpoint("v2_6")))
    )
    found = {}
    for rank in range(2):
        trainer = SimpleNamespace(
            args=SimpleNamespace(world_size=2, process_index=rank),
            is_fsdp_enabled=False,
            model=torch.nn.Linear(1, 1),
            compute_loss_context_manager=torch.no_grad,
        )
        callback = PredictionCallback(trainer, asked, samples=5, batch_size=2)
        assert callback.indices == [0, 2, 4, 6, 8]
        seen = []
        monkeypatch.setattr(
            "minicpm_tune.answering.prediction_callback.predict",
            lambda _, __, mine, seen=seen, **options: (
                seen.append((mine, options["synced"])) or [[{"row": r} for r in mine]]
            ),
        )
        monkeypatch.setattr(
            "minicpm_tune.answering.prediction_callback.gather",
            lambda _: [{r: {"row": r} for r in range(10)}],
        )
        callback.answers()
        monkeypatch.setattr(
            "minicpm_tune.answering.prediction_callback.is_deepspeed_zero3_enabled", lambda: True
        )
        callback.answers()
        monkeypatch.setattr(
            "minicpm_tune.answering.prediction_callback.is_deepspeed_zero3_enabled", lambda: False
        )
        found[rank] = seen
    assert found == {
        0: [([0, 4, 8], False), ([0, 4, 8], True)],
        1: [([2, 6], False), ([2, 6, 2], True)],  # as many as the other process, so that none waits
    }


def test_rows_that_the_check_left_out_are_not_answered(data):
    dataset = SupervisedDataset(data, load_processing(checkpoint("v2_6")))
    dataset.left_out.add(2)
    callback = PredictionCallback(SimpleNamespace(), PredictionRows(dataset), samples=5, batch_size=2)
    assert callback.indices == [0, 1, 3, 4]


def test_a_few_rows_are_answered_before_the_first_step_and_later_answers_are_forgotten_on_a_resume(
    data, tmp_path
):
    rows_asked = PredictionRows(SupervisedDataset(data, load_processing(checkpoint("v2_6"))))
    trainer = SimpleNamespace(is_fsdp_enabled=False, log=lambda logs: None, callback_handler=None)
    callback = PredictionCallback(trainer, rows_asked, samples=5, batch_size=2)
    callback.answers = lambda indices=callback.indices: [{"row": index, "scores": None} for index in indices]
    callback._show = lambda *_, **__: None
    callback.indices = list(range(10))
    args = SimpleNamespace(output_dir=str(tmp_path), eval_on_start=False)

    def begin(step, **changes):
        state = SimpleNamespace(global_step=step, is_world_process_zero=True)
        callback.on_train_begin(SimpleNamespace(**vars(args) | changes), state, None)
        return [(one["step"], len(one["answers"])) for one in read_answers(tmp_path)]

    assert begin(0) == [(0, 8)]
    for step in (5, 10):
        callback.on_evaluate(args, SimpleNamespace(global_step=step, is_world_process_zero=True), None)
    assert begin(5) == [(0, 8), (5, 5)]  # the answers of step 10 are of a step that comes again
    assert begin(0, eval_on_start=True) == []  # that evaluation is before the first step
    trainer.is_fsdp_enabled = True
    assert begin(0) == []


def test_the_picture_of_a_row_is_not_its_sound(tmp_path):
    path = write_rows(tmp_path, [{"audio": "a.wav", "conversations": chat("What?", "A.")}])
    assert PredictionRows(SupervisedDataset(path, load_processing(checkpoint("o4_5")))).picture(0) is None
