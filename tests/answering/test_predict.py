"""predict.py and answers during training: the right rows, once each, whatever stops the run."""

import json
import re
from pathlib import Path

import pytest
from transformers import TrainerCallback

import predict
from dataset import SupervisedDataset
from minicpm_tune.answering import prediction
from minicpm_tune.answering.metrics import corpus_scores, score
from minicpm_tune.answering.prediction import PredictionFile, PredictionFileError, PredictionRows
from minicpm_tune.data.samples import load_processing
from minicpm_tune.errors import DataError
from support import processes
from support.golden_checkpoints import processing
from support.paths import IMAGES, SUPPORT
from support.prediction_rows import TOKENS, expected_predictions, rows
from support.rows import picture, write_rows
from support.tiny_checkpoints import checkpoint, copied, loaded, saved_adapter

QUESTIONS = ("What is it?", "How many cats are there?", "Why?", "And the color?", "Describe the picture.")


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
