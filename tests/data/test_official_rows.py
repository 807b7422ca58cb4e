"""``convert_data.py rows``: what it writes gives the same samples as the rows it was given."""

import base64
import io
import json
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image

import convert_data
from dataset import SupervisedDataset
from minicpm_tune.data.official_rows import OfficialForm
from minicpm_tune.data.row_parsing import parse_row
from support.golden_checkpoints import processing
from support.rows import chat

ROWS = [
    {"id": "a", "image": "a.png", "conversations": chat("What?", "A <image> of red.")},
    {"id": "b", "images": ["a.png", "b.png"], "messages": chat("<image>Which of <image_01>?", "\\<image> is text.")},
    {"image": {"<image_05>": "b.png", "<image_02>": "a.png"}, "conversations": chat("<image_02> or not?", "No.")},
    {"image": "a.png", "conversations": [{"from": "human", "value": "<ImageHere>x"}, {"from": "gpt", "value": "y"}]},
    {"system": "Be brief.", "history": [["1?", "One."]], "query": "2?", "response": "Two.", "weight": 0.5},
    {"image": "b.png", "question": "How many?", "answers": ["2", "3", "3"]},
    {"images": ["a.png", "a.png", "b.png"], "messages": chat("Compare.", "Two are alike.")},
    {"image": {"<image_00>": "a.png", "<image_01>": "a.png"}, "messages": chat("<image_01> is there twice.", "Yes.")},
    {
        "images": ["b.png", "a.png"],
        "messages": chat("<image> and <image>: find <ref-object>.", "<ref-object><bbox>, <bbox>"),
        "objects": {
            "ref": ["red", "red"], "bbox": [[1, 2, 20, 25], [3, 4, 8, 9]], "image_id": [1, 0], "bbox_type": "real"
        },
    },
    {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "b.png"}, {"type": "text", "text": "<b>"}]},
            {"role": "assistant", "content": "No.", "weight": 0},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes.", "loss": True},
        ]
    },
    {"literal_control_tokens": True, "image": "a.png", "conversations": chat("<image> <image 1> <|im_end|>", "</s>")},
    {"videos": [["a.png", "b.png"], ["b.png"]], "messages": chat("<video> first", "and <video>")},
    {
        "messages": [
            {"role": "user", "content": [
                {"type": "text", "text": "See: "}, {"type": "video", "video": ["a.png", "b.png", "a.png"], "fps": 2},
            ]},
            {"role": "assistant", "content": "Colors."},
        ]
    },
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    Image.new("RGB", (30, 40), "blue").save(tmp_path / "b.png")
    return tmp_path


def converted(folder, rows, *flags, name="rows.json", output="new/official.json"):
    (folder / "new").mkdir(exist_ok=True)
    if isinstance(rows, list):
        (folder / name).write_text(json.dumps(rows))
    code = convert_data.main(["rows", str(folder / name), "--output", str(folder / output), *flags])
    return code, folder / output


def samples(path, generation, **options):
    rows = SupervisedDataset(path, processing(generation, **options))
    return [rows[index] for index in range(rows.mixture.row_count)]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value) if isinstance(value, torch.Tensor) else key == "origin", key


@pytest.mark.parametrize("generation", ["v2_6", pytest.param("v4_6", marks=pytest.mark.slow)])
def test_the_official_form_gives_the_same_samples(folder, generation):
    code, path = converted(folder, ROWS)
    assert code == 0
    official = json.loads(path.read_text())
    assert all(row.keys() & {"messages", "images", "system", "query"} == set() for row in official)
    assert official[0] == {
        "id": "a",
        "image": "../a.png",
        "conversations": [
            {"role": "user", "content": "What?"},
            {"role": "assistant", "content": "A <image> of red."},
        ],
    }
    assert list(official[1]["image"]) == ["<image_00>", "<image_01>"]
    for found, expected in zip(
        samples(path, generation), samples(folder / "rows.json", generation), strict=True
    ):
        assert_same(found, expected)


CASES = json.loads((Path(__file__).parent / "cases" / "rows.json").read_text(encoding="utf-8"))["rows"]


@pytest.mark.parametrize("image_end", ["\n", ""])  # MiniCPM-V's, and InternLM-XComposer2's
def test_every_form_that_people_write_has_an_official_counterpart(folder, image_end):
    form = OfficialForm(folder / "official.json", folder / "media")
    for case in CASES:
        if "prompt" in case:
            written, _ = form.write(case["row"], folder)
            expected = parse_row(case["row"], image_end=image_end, hears=True)
            found = parse_row(written, image_end=image_end, hears=True)
            assert found.turns == expected.turns, case["case"]
            assert [source.value for source in found.sources] == [source.value for source in expected.sources]


def test_lines_are_written_for_jsonl_and_read_again(folder):
    code, path = converted(folder, ROWS[:3], output="new/official.jsonl")
    assert (code, len(path.read_text().splitlines())) == (0, 3)
    for found, expected in zip(samples(path, "v2_6"), samples(folder / "rows.json", "v2_6"), strict=True):
        assert_same(found, expected)


def test_bytes_and_base64_become_files_once(folder):
    data = (folder / "a.png").read_bytes()
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), "green").save(buffer, "JPEG")
    rows = [
        {"image": {"bytes": data, "path": "x.png"}, "query": "1?", "response": "One."},
        {"image": {"bytes": data, "path": None}, "query": "2?", "response": "Two."},
        {"image": {"bytes": buffer.getvalue(), "path": None}, "query": "3?", "response": "Three."},
    ]
    datasets.Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
    code, path = converted(folder, None, "--media_dir", str(folder / "media"), name="rows.parquet")
    assert code == 0
    assert sorted(file.suffix for file in (folder / "media").iterdir()) == [".jpg", ".png"]
    for found, expected in zip(samples(path, "v2_6"), samples(folder / "rows.parquet", "v2_6"), strict=True):
        assert_same(found, expected)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    code, path = converted(folder, [{"image": uri, "query": "?", "response": "!"}], output="new/other.json")
    assert (code, [file.suffix for file in (folder / "new" / "other_media").iterdir()]) == (0, [".png"])
    assert json.loads(path.read_text())[0]["image"].startswith("other_media/")


def test_audio_and_columns_are_kept(folder):
    (folder / "a.wav").write_bytes(b"RIFF....WAVE")
    row = {"clip": ["a.wav"], "ask": "<audio>What?", "say": "A word.", "license": "MIT"}
    code, path = converted(
        folder, [row], "--columns", '{"clip": "audios", "ask": "user", "say": "assistant"}'
    )
    assert code == 0
    assert json.loads(path.read_text()) == [
        {"audio": "../a.wav", "conversations": chat("<audio>What?", "A word.")}
    ]


def test_bad_rows_are_left_out_counted_and_make_the_exit_code_1(folder, capsys):
    rows = [*ROWS[:1], {"image": "no.png", "query": "?", "response": "!"}, {"license": "MIT"}]
    code, path = converted(folder, rows)
    printed = capsys.readouterr()
    assert (code, len(json.loads(path.read_text()))) == (1, 1)
    assert "1 rows: " in printed.out
    assert "left out: 2 rows that can't be used" in printed.out
    assert "rows.json: row 1: image 'no.png' not found" in printed.err
    assert "row 2: the row has the keys 'license', expected 'conversations'" in printed.err
    code, path = converted(folder, rows[1:], output="new/none.json")
    assert code == 1
    assert not path.exists()
    assert "none of the 2 rows" in capsys.readouterr().err


def test_a_file_is_never_replaced_without_being_told_to(folder, capsys):
    converted(folder, ROWS[:1])
    code, path = converted(folder, ROWS[:2])
    assert (code, len(json.loads(path.read_text()))) == (1, 1)
    assert "the file exists. Name another, or pass --overwrite true" in capsys.readouterr().err
    assert converted(folder, ROWS[:2], "--overwrite", "true")[0] == 0
    assert len(json.loads(path.read_text())) == 2
    assert converted(folder, ROWS[:1], "--overwrite", "true", output="rows.json")[0] == 1
    assert "the rows are read from this file" in capsys.readouterr().err
