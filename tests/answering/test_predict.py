"""predict.py and answers during training: the right rows, once each, whatever stops the run."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import predict
from dataset import SupervisedDataset, data_collator
from minicpm_tune.answering import prediction
from minicpm_tune.answering.generate import GREEDY
from minicpm_tune.answering.metrics import corpus_scores, score
from minicpm_tune.answering.prediction import PredictionFile, PredictionFileError, PredictionRows
from minicpm_tune.answering.prediction_callback import PredictionCallback, read_answers
from minicpm_tune.data.samples import load_processing
from minicpm_tune.errors import DataError
from support import processes
from support.golden_checkpoints import processing
from support.paths import IMAGES, SUPPORT
from support.rows import chat, picture, write_rows
from support.tiny_checkpoints import checkpoint, copied, loaded, saved_adapter

TOKENS = 6
QUESTIONS = ("What is it?", "How many cats are there?", "Why?", "And the color?", "Describe the picture.")


def rows():
    """Five rows: one image, none, several turns, no answer to compare, a system turn and two images."""

    def turns(*texts):
        return [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(texts)]

    small, wide = str(IMAGES / "small.png"), str(IMAGES / "wide.png")
    return [
        {"id": "a", "image": small, "conversations": turns("<image>\nWhat is it?", "A cat.")},
        {"id": "b", "conversations": turns("How many cats are there?", "Two.")},
        {
            "id": "c",
            "image": small,
            "conversations": turns("<image>\nWhat is it?", "A cat.", "Why?", "It has fur."),
        },
        {"id": "d", "image": small, "conversations": turns("<image>\nAnd the color?")},
        {
            "image": {"<image_00>": small, "<image_01>": wide},
            "conversations": [
                {"role": "system", "content": "Be brief."},
                *turns("<image_00>\n<image_01>\nDescribe the picture.", "Cats."),
            ],
        },
    ]


@pytest.fixture
def data(tmp_path):
    return write_rows(tmp_path, rows())


def words(data, output, *more):
    limit = () if "--max_new_tokens" in more else ("--max_new_tokens", TOKENS)
    return [
        "--model_name_or_path", checkpoint("v2_6"), "--data_path", data, "--output", output,
        "--device", "cpu", "--batch_size", 2, *limit, *more,
    ]  # fmt: skip


def run(*arguments):
    predict.run(predict.parse_flags([str(word) for word in words(*arguments)]))
    return read(arguments[1])


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def expected_predictions(name="v2_6"):
    model = loaded(checkpoint(name), name)
    small, wide = picture(), picture("wide")
    messages = [
        [{"role": "user", "content": [small, "What is it?"]}],
        [{"role": "user", "content": "How many cats are there?"}],
        [
            {"role": "user", "content": [small, "What is it?"]},
            {"role": "assistant", "content": "A cat."},
            {"role": "user", "content": "Why?"},
        ],
        [{"role": "user", "content": [small, "And the color?"]}],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [small, wide, "Describe the picture."]},
        ],
    ]
    return [model.chat(msgs=msgs, sampling=False, max_new_tokens=TOKENS, **GREEDY) for msgs in messages]


def test_every_row_is_answered_as_chat_answers_it(data, tmp_path, capsys):
    lines = run(data, tmp_path / "out.jsonl")
    assert [line["prediction"] for line in lines] == expected_predictions()
    assert [line["row"] for line in lines] == [0, 1, 2, 3, 4]
    assert [line["id"] for line in lines] == ["a", "b", "c", "d", None]
    assert tuple(line["question"] for line in lines) == QUESTIONS
    assert [line["answer"] for line in lines] == ["A cat.", "Two.", "It has fur.", None, "Cats."]
    assert lines[0]["scores"] == score(lines[0]["prediction"], "A cat.")
    assert lines[3]["scores"] is None
    summary = json.loads((tmp_path / "out.jsonl.summary.json").read_text())
    assert summary["rows"] == 5
    compared = [line["scores"]["anls"] for line in lines if line["scores"]]
    assert summary["scores"]["anls"] == pytest.approx(sum(compared) / 4)
    assert "5 rows answered, 4 compared" in capsys.readouterr().out


class StoppedError(Exception):
    pass


def test_a_stopped_run_goes_on_and_no_row_is_answered_twice(data, tmp_path, monkeypatch):
    expected = run(data, tmp_path / "whole.jsonl")
    output = tmp_path / "out.jsonl"
    append = PredictionFile.append

    def stop(self, lines):
        append(self, lines)
        with self.own.open("a") as file:
            file.write('{"row": 2, "pred')  # killed while the next line was written
        raise StoppedError

    monkeypatch.setattr(PredictionFile, "append", stop)
    with pytest.raises(StoppedError):
        run(data, output)
    monkeypatch.setattr(PredictionFile, "append", append)
    answered = []
    original = prediction.predict
    monkeypatch.setattr(prediction, "predict", lambda *a, **k: answered.extend(a[2]) or original(*a, **k))
    assert run(data, output) == expected
    assert answered == [2, 3, 4]
    assert run(data, output) == expected
    assert answered == [2, 3, 4]


def test_several_processes_write_the_lines_of_one(data, tmp_path):
    expected = run(data, tmp_path / "one.jsonl")
    output = tmp_path / "two.jsonl"
    # A run of two processes that was killed: rank 1 had written a row, rank 0 half a line.
    (tmp_path / "two.jsonl.rank1").write_text(json.dumps(expected[1]) + "\n")
    (tmp_path / "two.jsonl.rank0").write_text('{"row": 0')
    settings = json.loads((tmp_path / "one.jsonl.summary.json").read_text())["settings"]
    (tmp_path / "two.jsonl.summary.json").write_text(json.dumps({"settings": settings}))
    done = processes.run([*processes.torchrun(2, predict.__file__), *words(data, output)], limit=240)
    assert done.returncode == 0, done.stderr[-4000:]
    assert read(output) == expected
    assert "1 of 5 rows are answered already" in done.stderr
    assert sorted(path.name for path in tmp_path.glob("two.*")) == ["two.jsonl", "two.jsonl.summary.json"]


def test_an_output_of_other_settings_is_not_continued(data, tmp_path):
    output = tmp_path / "out.jsonl"
    run(data, output, "--limit", 1)
    with pytest.raises(PredictionFileError, match=r"written with max_new_tokens 6, but now it is 7"):
        run(data, output, "--max_new_tokens", 7)
    assert len(run(data, output, "--max_new_tokens", 7, "--limit", 2, "--overwrite", "true")) == 2
    (tmp_path / "out.jsonl.summary.json").unlink()
    with pytest.raises(PredictionFileError, match="so nobody can tell which model wrote it"):
        run(data, output)
    output.write_text('{"row": 1}\nnonsense\n')
    (tmp_path / "out.jsonl.summary.json").write_text('{"settings": {}}')
    with pytest.raises(PredictionFileError, match="line 2 is not a prediction"):
        PredictionFile(output).prepare({}, overwrite=False)


def test_an_adapter_thinking_and_a_system_prompt_reach_the_answers(data, tmp_path):
    saved_adapter(tmp_path / "adapter", "v2_6")
    plain = run(data, tmp_path / "plain.jsonl", "--limit", 2)
    tuned = run(data, tmp_path / "tuned.jsonl", "--limit", 2, "--adapter", tmp_path / "adapter")
    assert [line["prediction"] for line in tuned] != [line["prediction"] for line in plain]
    rules = load_processing(checkpoint("v4_5"))
    asked = PredictionRows(SupervisedDataset(data, rules), thinking=True, system_prompt="Be kind.")
    text = rules.tokenizer.decode(asked[1].prompt["input_ids"])
    assert text.startswith("<|im_start|>system\nBe kind.<|im_end|>")
    assert not text.endswith("</think>\n\n")
    assert "Be brief" in rules.tokenizer.decode(asked[4].prompt["input_ids"])


def test_rows_that_cannot_be_answered_are_named_before_the_model_loads(tmp_path, monkeypatch):
    broken = write_rows(
        tmp_path, [rows()[1], {"id": "x", "image": "gone.png", "conversations": rows()[1]["conversations"]}]
    )
    monkeypatch.setattr(
        "minicpm_tune.answering.load.load_model", lambda *_, **__: pytest.fail("the model was loaded")
    )
    with pytest.raises(DataError, match=r"1 of 2 rows can't be used:\n.*row 1 .*gone.png"):
        run(broken, tmp_path / "out.jsonl")


def test_bad_rows_are_left_out_and_listed_when_asked(tmp_path, capsys):
    whole = (IMAGES / "small.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])  # found when it is decoded
    gone = {"id": "gone", **rows()[0], "image": "gone.png"}
    surrogate = {"id": "half an emoji \ud83d", "conversations": rows()[1]["conversations"]}
    data = tmp_path / "train.json"
    data.write_text(json.dumps([rows()[0], gone, {**gone, "image": "half.png"}, surrogate, rows()[1]]))
    output = tmp_path / "out.jsonl"
    lines = run(data, output, "--on_bad_row", "skip")
    assert [line["row"] for line in lines] == [0, 4]
    listed = read(tmp_path / "out.jsonl.bad_rows.jsonl")
    assert {bad["row"]: bad["kind"] for bad in listed} == {
        1: "missing image",
        2: "image",
        3: listed[1]["kind"],
    }
    assert "bad rows: 3 contributed nothing (" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"2 of 3 rows can't be used:\n.*row 1 .*gone.png"):
        run(data, output)
    assert run(data, output, "--on_bad_row", "skip") == lines
    assert len(read(tmp_path / "out.jsonl.bad_rows.jsonl")) == 3


@pytest.mark.parametrize(
    ("name", "file"), [("v2_6", "preprocessor_config.json"), ("v4_6", "processor_config.json")]
)
def test_a_checkpoint_without_image_numbers_is_followed_everywhere(name, file, data, tmp_path, monkeypatch):
    numbered = checkpoint(name)
    plain = copied(numbered, tmp_path / "plain")
    settings = (plain / file).read_text()
    assert '"use_image_id": true' in settings
    (plain / file).write_text(settings.replace('"use_image_id": true', '"use_image_id": false'))
    asked = []
    monkeypatch.setattr(
        "minicpm_tune.answering.generate.answer",
        lambda _, __, prompts, **___: asked.append(prompts[0]) or ["yes"],
    )
    for folder in (numbered, plain):
        processing = load_processing(folder)
        mark = processing.tokenizer.convert_tokens_to_ids("<image_id>")
        trained = SupervisedDataset(data, processing)
        loaded(folder, name).chat(picture(), [{"role": "user", "content": "What is it?"}])
        samples = [trained[0], PredictionRows(trained)[0].prompt, asked[-1]]
        assert [mark in sample["input_ids"] for sample in samples] == [folder == numbered] * 3


def test_flags_that_messages_advise_act(data, tmp_path):
    moved = [{**row, "image": "small.png"} for row in rows()[:1]]
    path = write_rows(tmp_path, moved)
    lines = run(path, tmp_path / "out.jsonl", "--image_folder", IMAGES)
    assert lines[0]["prediction"] == expected_predictions()[0]
    with pytest.raises(DataError, match="expected at most 10"):
        run(path, tmp_path / "other.jsonl", "--image_folder", IMAGES, "--max_image_pixels", 10)
    control = {"conversations": [{"role": "user", "content": "What does <|im_end|> mean?"}]}
    path = write_rows(tmp_path, [control])
    with pytest.raises(DataError, match=re.escape("contains '<|im_end|>'")):
        run(path, tmp_path / "refused.jsonl")
    assert len(run(path, tmp_path / "control.jsonl", "--literal_control_tokens", "true")) == 1


# --- during training ---


class Trained(TrainerCallback):
    """Keeps what the trainer logs."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def sounds_and_texts(folder):
    """Two rows with audio, and one without."""
    wave = {"array": [0.0] * 16_000, "sampling_rate": 16_000}
    answers = ("Two cats and a dog.", "A bell", "Yes.")
    rows = [
        {"conversations": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": answer}]}
        for answer in answers
    ]
    for row in rows[:2]:
        row["audio"] = wave
    return write_rows(folder, rows)


def predicted(folder, monkeypatch, *, metrics=None):
    """The lines and the scores of answers that a model is said to give."""
    given = iter(("two cats and one dog", "a bell", "No."))
    monkeypatch.setattr(
        "minicpm_tune.answering.prediction.answer",
        lambda model, processing, prompts, **_: [next(given) for _ in prompts],
    )
    rows = PredictionRows(SupervisedDataset(sounds_and_texts(folder), processing("o4_5")), metrics=metrics)
    lines = [
        line for batch in prediction.predict(None, rows, range(3), batch_size=2, options={}) for line in batch
    ]
    return lines, corpus_scores(lines)


def test_error_rates_are_of_the_rows_with_audio(tmp_path, monkeypatch):
    lines, scores = predicted(tmp_path, monkeypatch)
    assert [line.get("edits") for line in lines] == [
        {"wer": (1, 5), "cer": (3, 14)}, {"wer": (0, 2), "cer": (0, 5)}, None,
    ]  # fmt: skip
    assert scores["wer"] == pytest.approx(1 / 7)  # over all words, not the mean of 1/5 and 0
    assert scores["cer"] == pytest.approx(3 / 19)
    assert scores["exact_match"] == 0


def test_metrics_that_are_asked_for_are_the_only_ones_and_of_all_rows(tmp_path, monkeypatch):
    lines, scores = predicted(tmp_path, monkeypatch, metrics=["wer"])
    assert [line["scores"] for line in lines] == [{}, {}, {}]
    assert scores == {"wer": pytest.approx(2 / 8)}
    assert predict.parse_flags(
        [str(word) for word in words("rows.json", "out.jsonl", "--metrics", "wer", "cer")]
    ).metrics
    with pytest.raises(SystemExit):
        predict.parse_flags([str(word) for word in words("rows.json", "out.jsonl", "--metrics", "bleu")])


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v2_6", "v4_7"])
def test_answers_under_zero_3_are_those_of_one_process(name, data, tmp_path):
    worker = SUPPORT / "predict_worker.py"
    given = (checkpoint(name), data, tmp_path / "out")
    done = processes.run([*processes.torchrun(2, worker), *given], limit=280)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads((tmp_path / "out").read_text()) == expected_predictions(name)


def test_control_texts_that_are_written_as_text_are_asked(tmp_path):
    turns = [{"role": "user", "content": "Close \\</s> this"}, {"role": "assistant", "content": "Yes."}]
    rows = SupervisedDataset(
        write_rows(tmp_path, [{"conversations": turns}]), load_processing(checkpoint("v2_6"))
    )
    question = PredictionRows(rows)[0]
    assert "Close </s> this" in rows.processing.tokenizer.decode(question.prompt["input_ids"])
