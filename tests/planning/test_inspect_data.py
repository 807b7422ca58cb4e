"""inspect_data.py: what it reports, writes and shows."""

import json
import re
import sys

import numpy as np
import pytest
from PIL import Image

from dataset import SupervisedDataset
from inspect_data import open_rows, parse_flags, report
from inspect_data import run as inspect
from minicpm_tune.errors import DataError
from minicpm_tune.files import OutputError
from minicpm_tune.planning.data_report import summarize
from minicpm_tune.planning.row_statistics import padding_shares, pixel_hashes
from minicpm_tune.planning.row_view import contact_sheet, slice_images, spectrogram
from support import processes
from support.golden_checkpoints import checkpoint_folder, processing
from support.paths import FINETUNE, GOLDENS, IMAGES
from support.rows import chat, write_rows

SCRIPT = FINETUNE / "inspect_data.py"


def row(number, image="small", answer="A cat."):
    return {"id": number, "image": str(IMAGES / f"{image}.png"), "conversations": chat("What?", answer)}


def flags(path, *more, name="v2_6"):
    return parse_flags(
        ["--model_name_or_path", str(checkpoint_folder(name)), "--data_path", str(path), *more]
    )


def survey(path, *more, name="v2_6"):
    values = flags(path, *more, name=name)
    rows = open_rows(values)
    found = report(rows, values)
    return rows, found, summarize(found, rows, batch_size=values.per_device_train_batch_size)


GOOD = [row(0), row(1, "big"), {"id": 2, "conversations": chat("Hi", "Yes.")}, row(3, "wide", "A dog. " * 30)]
BAD = [{"id": "role", "conversations": [{"role": "cat"}]}, {**row("gone"), "image": "gone.png"}]


def test_good_rows_are_counted_and_measured(tmp_path):
    rows, found, summary = survey(write_rows(tmp_path, GOOD), "--per_device_train_batch_size", "2")
    lengths = [len(rows[index]["input_ids"]) for index in range(4)]
    assert found.column("length").tolist() == lengths
    assert found.lengths[:, -1].tolist() == lengths
    assert (summary["rows"], summary["usable"], summary["bad"]) == (4, 4, 0)
    assert (summary["with_pictures"], summary["text_only"]) == (3, 1)
    assert summary["tokens"]["100%"] == max(lengths)
    assert summary["tokens"]["sum"] == summary["tokens_per_epoch"] == sum(lengths)
    assert summary["slices"]["100%"] == 5
    assert summary["recommended_model_max_length"] == -(-max(lengths) // 64) * 64
    assert summary["recommended_max_slice_nums"] == 4
    assert 0 < summary["padding_share"] < 1


def test_lengths_by_limit_are_those_of_samples_made_with_it(tmp_path):
    for name in ("v2", "v2_6", "v4_6"):
        path = write_rows(tmp_path, GOOD)
        _, found, _ = survey(path, name=name)
        for limit in (1, 2, 4):
            limited = SupervisedDataset(path, processing(name, max_slice_nums=limit))
            expected = [len(limited[index]["input_ids"]) for index in range(4)]
            assert found.lengths[:, limit - 1].tolist() == expected, (name, limit)


def test_new_tokens_count_as_one_token_each(tmp_path):
    path = write_rows(tmp_path, [row(0, answer="<cat_a>")])
    (tmp_path / "tokens.txt").write_text("<cat_a>\n")
    _, before, _ = survey(path)
    rows, found, _ = survey(path, "--new_tokens", str(tmp_path / "tokens.txt"))
    written = rows.processing.tokenizer.tokenize("<cat_a>")
    assert written == ["<cat_a>"]
    assert found.column("length")[0] < before.column("length")[0]


def test_bad_rows_are_listed_by_kind_and_make_the_exit_code(tmp_path, capsys):
    path = write_rows(tmp_path, GOOD + BAD)
    page_file = tmp_path / "report.html"
    assert inspect(flags(path, "--report", str(page_file))) == 1
    text = capsys.readouterr().out
    assert "1 role: rows 4" in text
    assert "1 missing image: rows 5" in text
    assert f"{path}: row 4 (id 'role'): turn 0 has role 'cat'" in text
    assert inspect(flags(write_rows(tmp_path, GOOD))) == 0


def test_damaged_images_are_found_by_decoding(tmp_path):
    whole = (IMAGES / "wide.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    path = write_rows(tmp_path, [GOOD[0], {**row(1), "image": "half.png"}])
    assert inspect(flags(path)) == 1
    assert inspect(flags(path, "--check_images", "header")) == 0


def test_the_json_file_holds_every_sample(tmp_path):
    path, out = write_rows(tmp_path, GOOD + BAD), tmp_path / "out.json"
    inspect(flags(path, "--json", str(out), "--workers", "2"))
    written = json.loads(out.read_text())
    assert written["summary"]["bad"] == 2
    rows = SupervisedDataset(path, processing("v2_6"))
    assert [entry["row"] for entry in written["rows"]] == list(range(6))
    for index, entry in enumerate(written["rows"][:4]):
        sample = rows[index]
        assert entry["ok"]
        assert (entry["id"], entry["file"]) == (index, str(path))
        for key in ("input_ids", "labels", "image_bound", "tgt_sizes"):
            assert entry[key] == sample[key].tolist()
        assert entry["pixels"] == pixel_hashes(sample)
    assert [(entry["ok"], entry["kind"]) for entry in written["rows"][4:]] == [
        (False, "role"),
        (False, "missing image"),
    ]


def test_the_flags_of_training_decide_what_is_bad(tmp_path):
    path = write_rows(tmp_path, GOOD)
    assert inspect(flags(path, "--model_max_length", "60")) == 1
    assert inspect(flags(path, "--model_max_length", "60", "--overlength", "drop")) == 0
    assert inspect(flags(path, "--model_max_length", "60", "--overlength", "error")) == 1
    assert inspect(flags(path, "--max_slice_nums", "1", "--model_max_length", "60")) == 0


def test_bad_rows_count_neither_in_an_epoch_nor_in_what_is_recommended(tmp_path, capsys):
    unusable = [
        {
            "id": "long",
            "conversations": [
                *chat("word " * 3000, "Yes.")[:1],
                {"role": "assistant", "content": "Yes.", "loss": False},
            ],
        },
        {**row("gone"), "image": "gone.png", "conversations": chat("word " * 3000, "Yes.")},
    ]
    _, found, summary = survey(write_rows(tmp_path, GOOD + unusable), "--model_max_length", "0")
    _, _, expected = survey(write_rows(tmp_path, GOOD), "--model_max_length", "0")
    assert (summary["bad"], len(found.numbers)) == (2, 4)
    for name in ("recommended_model_max_length", "samples_per_epoch", "tokens_per_epoch", "tokens"):
        assert summary[name] == expected[name], name
    assert "an epoch     4 samples, " in capsys.readouterr().out


def test_a_row_that_is_only_too_long_counts_in_the_recommended_length(tmp_path, capsys):
    long = row("long", answer="A dog. " * 200)
    lengths = {}
    for how in ("truncate", "drop", "error"):
        _, found, summary = survey(
            write_rows(tmp_path, [*GOOD, long]), "--model_max_length", "100", "--overlength", how
        )
        lengths[how] = summary["recommended_model_max_length"]
        assert summary["samples_per_epoch"] == found.usable
    assert set(lengths.values()) == {-(-int(found.column("length").max()) // 64) * 64}
    assert "or use --overlength shrink_slices, which cuts the images" in capsys.readouterr().out
    whole = (IMAGES / "small.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    damaged = {**long, "image": "half.png"}  # too long, and of no use with any limit
    _, found, _ = survey(write_rows(tmp_path, [*GOOD, long, damaged]), "--model_max_length", "100")
    assert (len(found.bad), len(found.numbers)) == (2, 5)  # row 1 has nothing left to learn


def test_tokens_of_an_epoch_are_those_that_the_limit_leaves(tmp_path):
    for how, picked in (("truncate", [GOOD[0], *GOOD[2:]]), ("shrink_slices", GOOD)):
        flags = ("--model_max_length", "80", "--overlength", how)
        rows, _, summary = survey(write_rows(tmp_path, picked), *flags)
        kept = [len(rows[index]["input_ids"]) for index in range(len(picked))]
        assert (summary["tokens_per_epoch"], summary["usable"]) == (sum(kept), len(picked)), how


def test_rows_with_token_id_0_are_counted_where_it_is_text(tmp_path, capsys):
    path = write_rows(tmp_path, [*GOOD, row("zero", answer="Stop!")])
    zero = processing("v2_6").tokenizer.convert_tokens_to_ids("!")
    assert zero == 0
    assert survey(path)[2]["rows_with_token_id_0"] == 1
    assert "token id 0   1 row with '!', which the released chat() hides" in capsys.readouterr().out
    assert survey(path, name="v4")[2]["rows_with_token_id_0"] == 0  # there it is <unk>
    assert "token id 0" not in capsys.readouterr().out


def test_keys_that_nothing_reads_are_counted(tmp_path, capsys):
    keyed = [{**each, "license": "CC0"} for each in GOOD[:2]]
    keyed[0]["conversations"] = [{**turn, "author": "me"} for turn in keyed[0]["conversations"]]
    _, _, summary = survey(write_rows(tmp_path, [*keyed, GOOD[2]]))
    assert summary["unknown_keys"] == {"row 'license'": 2, "message 'author'": 1}
    assert (
        "unknown keys nothing reads row 'license' (2 rows), message 'author' (1 row)"
        in capsys.readouterr().out
    )


def test_reports_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path, out = write_rows(tmp_path, GOOD), tmp_path / "out.json"
    out.write_text("from before")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("minicpm_tune.planning.row_statistics.collect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        inspect(flags(path, "--json", str(out), "--report", str(tmp_path / "page.html")))
    assert out.read_text() == "from before"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out.json", path.name]
    with pytest.raises(OutputError, match=f"--report {tmp_path}: found a folder, expected a file"):
        inspect(flags(path, "--report", str(tmp_path)))
    with pytest.raises(OutputError, match=r"--json .*none/out.json: it can't be written: No such file"):
        inspect(flags(path, "--json", str(tmp_path / "none" / "out.json")))


def test_show_prints_the_prompt_and_draws_the_slices(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_rows(tmp_path, GOOD + BAD)
    assert inspect(flags(path, "--show", "1", "2")) == 0
    text = capsys.readouterr().out
    assert "<image_id>0</image_id><image><unk>x16</image><slice><unk>x16</slice>" in text
    assert "[[A cat.<|im_end|>]]" in text
    assert "[[Yes.<|im_end|>]]" in text
    with Image.open(tmp_path / "sample_1.png") as sheet:
        assert sheet.width > 1000
    assert not (tmp_path / "sample_2.png").exists()
    assert inspect(flags(path, "--show", "4")) == 1
    with pytest.raises(DataError, match="--show 9: expected a number from 0 to 5, as there are 6 rows"):
        inspect(flags(path, "--show", "9"))


def test_show_draws_the_boxes_on_their_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (60, 40), "white").save("a.png")
    found = {
        "image": "a.png",
        "conversations": chat("Where?", "<bbox>"),
        "objects": {"bbox": [[6, 4, 30, 20]]},
    }
    path = write_rows(tmp_path, [found, GOOD[0]])
    assert inspect(flags(path, "--show", "0", "1")) == 0
    text = capsys.readouterr().out
    assert "[[<box>100 100 500 500</box><|im_end|>]]" in text
    assert text.count("boxes: ") == text.count("boxes: sample_0_boxes.png") == 1
    colored = (np.asarray(Image.open("sample_0_boxes.png")) != 255).any(axis=2)
    down, across = colored.nonzero()
    assert (across.min(), down.min(), across.max(), down.max()) == (6, 4, 30, 20)


def audio_row(wave, text="What is it?"):
    return {
        "audio": str(GOLDENS / "audio" / f"{wave}.wav"),
        "conversations": chat(f"<audio>\n{text}", "A cat."),
    }


def test_audio_is_measured_in_tokens_and_seconds(tmp_path, capsys):
    path = write_rows(tmp_path, [audio_row("speech"), GOOD[0], audio_row("half"), GOOD[2]])
    out = tmp_path / "out.json"
    assert inspect(flags(path, "--json", str(out), name="o4_5")) == 0
    text = capsys.readouterr().out
    assert "4 (1 with pictures, 2 with audio, 1 text only)" in text
    written = json.loads(out.read_text())
    summary = written["summary"]
    assert summary["audio_tokens"] == {
        "0%": 7, "50%": 7, "90%": 25, "99%": 25, "100%": 25, "mean": 16.0, "sum": 32,
    }  # fmt: skip
    assert summary["audio_seconds"]["100%"] == 2.32
    assert summary["tokens"]["sum"] == sum(
        summary[kind]["sum"] for kind in ("text_tokens", "image_tokens", "audio_tokens")
    )
    assert re.search(r"^audio tokens +7 +7 +25 .* 32$", text, re.MULTILINE)
    first = written["rows"][0]
    assert first["audio_segments"] == [[233, 233, 23]]
    assert [end - start for start, end in first["audio_bound"]] == [23]
    _, _, silent = survey(write_rows(tmp_path, GOOD), name="o4_5")
    assert (silent["with_audio"], silent["audio_tokens"], silent["audio_seconds"]) == (0, {}, {})


def test_show_draws_the_log_mel_frames(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_rows(tmp_path, [audio_row("speech")])
    assert inspect(flags(path, "--show", "0", name="o4_5")) == 0
    text = capsys.readouterr().out
    assert "0 slices, 2.33 s of audio as 23 tokens" in text
    assert "<|audio_start|><unk>x23<|audio_end|>" in text
    assert not (tmp_path / "sample_0.png").exists()
    assert (tmp_path / "sample_0_audio.png").is_file()


def test_the_spectrogram_has_a_strip_for_each_segment_with_loud_bands_dark_and_low_ones_below(tmp_path):
    seconds = np.arange(int(31.25 * 16_000)) / 16_000
    tone = {"array": (np.sin(2 * np.pi * 300 * seconds) * (seconds < 15)).tolist(), "sampling_rate": 16_000}
    rows = SupervisedDataset(write_rows(tmp_path, [audio_row("one") | {"audio": tone}]), processing("o4_5"))
    sheet = spectrogram(rows[0])
    assert sheet.width == 1600 + 16
    assert sheet.height == 2 * (160 + 14) + 3 * 8  # 30 s, and the rest
    gray = np.asarray(sheet.convert("L"))[8 + 14 : 8 + 14 + 160, 8:-8]
    low, high = gray[-40:, 100:700], gray[:120, 100:700]
    assert low.min() < 40
    assert high.min() > 80
    assert gray[:-8, 900:1500].min() > 200  # silence, over the ticks of the seconds


def test_slices_come_back_as_they_were_cut(tmp_path):
    prepared = processing("v2_6")
    sample = SupervisedDataset(write_rows(tmp_path, [row(0)]), prepared)[0]
    [image] = slice_images(sample)
    layout = prepared.rules.layout(*Image.open(IMAGES / "small.png").size)
    with Image.open(IMAGES / "small.png") as original:
        size = (layout.overview.width, layout.overview.height)
        expected = original.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(image), np.asarray(expected))
    assert contact_sheet(sample).size == (image.width + 16, image.height + 16)


def test_padding_shares():
    shares = padding_shares(np.array([10, 10, 10, 10]), batch_size=2, capacity=20)
    assert shares == {"plain": 0.0, "packed": 0.0}
    shares = padding_shares(np.array([30, 10]), batch_size=2, capacity=40)
    assert shares == {"plain": pytest.approx(1 / 3), "packed": 0.0}
    assert padding_shares(np.array([], dtype=int), batch_size=2, capacity=40) == {"plain": 0.0, "packed": 0.0}


def test_a_misspelled_flag_is_named_and_flags_of_training_are_known(tmp_path, capsys):
    path = write_rows(tmp_path, GOOD)
    with pytest.raises(SystemExit):
        flags(path, "--model_max_lenght", "100")
    assert "unknown flag --model_max_lenght; did you mean --model_max_length?" in capsys.readouterr().err
    flags(path, "--lora_r=8", "--evaluation_strategy", "no", "--gradient_checkpointing", "true", "--bf16")
    assert "change nothing here: --lora_r=8 --evaluation_strategy" in capsys.readouterr().err


def test_a_report_is_not_left_out_in_silence(tmp_path, capsys):
    path = write_rows(tmp_path, GOOD)
    with pytest.raises(SystemExit):
        flags(path, "--show", "0", "--report", "report.html")
    assert "--show prints rows and writes no --report" in capsys.readouterr().err


def run(*arguments, cwd):
    return processes.run([sys.executable, SCRIPT, *arguments], limit=120, cwd=cwd)


def test_the_command_gives_an_exit_code_and_ignores_flags_of_training(tmp_path):
    path = write_rows(tmp_path, BAD[:1])
    done = run(
        "--model_name_or_path",
        checkpoint_folder("v2_6"),
        "--data_path",
        path.name,
        "--learning_rate",
        "1e-5",
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert "ignored, because they change nothing here: --learning_rate" in done.stderr
    assert "bad          1" in done.stdout
    assert "Traceback" not in done.stderr
    shown = run("--help", cwd=tmp_path)
    assert shown.returncode == 0
    assert "--overlength" in shown.stdout
