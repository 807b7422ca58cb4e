"""COCO files become rows whose boxes the check accepts; what can't be used is left out and counted, or named."""

import json

import pytest
from PIL import Image

import convert_data
from dataset import SupervisedDataset
from minicpm_tune.data.files.coco import CocoFile
from minicpm_tune.data.row_check import check_rows
from minicpm_tune.errors import DataError
from support.golden_checkpoints import processing

COCO = {
    "images": [
        {"id": 1, "file_name": "a.png", "width": 60, "height": 40},
        {"id": 2, "file_name": "sub/b.png", "width": 40, "height": 60},
        {"id": 3, "file_name": "missing.png", "width": 40, "height": 60},
        {"id": 4, "file_name": "resized.png", "width": 400, "height": 600},
        {"id": 5, "file_name": "broken.png", "width": 4, "height": 4},
    ],
    "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 3, "bbox": [0, 0, 30, 20], "iscrowd": 0},
        {"id": 2, "image_id": 1, "category_id": 7, "bbox": [30, 10, 30.5, 20]},  # half a pixel too wide
        {"id": 3, "image_id": 1, "category_id": 7, "bbox": [6, 4, 6, 4]},
        {"id": 4, "image_id": 1, "category_id": 3, "bbox": [0, 0, 60, 40], "iscrowd": 1},
        {"id": 5, "image_id": 1, "category_id": 7, "bbox": [60, 0, 5, 5]},
        {"id": 6, "image_id": 4, "category_id": 7, "bbox": [0, 0, 5, 5]},
    ],
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images" / "sub").mkdir(parents=True)
    for name, size in {"a.png": (60, 40), "sub/b.png": (40, 60), "resized.png": (40, 60)}.items():
        Image.new("RGB", size, "red").save(tmp_path / "images" / name)
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    return tmp_path


def written(folder, task, capsys, *flags, content=COCO):
    """What the command writes: the rows, and what it says."""
    (folder / "coco.json").write_text(json.dumps(content))
    command = ["coco", folder / "coco.json", "--images", folder / "images", "--output", folder / "rows.jsonl"]
    code = convert_data.main([*map(str, command), "--task", task, *flags])
    said = capsys.readouterr()
    assert code == 0, said.err
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()], said.out


def said(row):
    return [turn["content"] for turn in row["conversations"]]


def test_detect_names_every_object_in_a_fixed_order(folder, capsys):
    rows, out = written(folder, "detect", capsys)
    assert [row["image"] for row in rows] == ["images/a.png", "images/sub/b.png"]
    assert rows[0]["objects"] == {
        "ref": ["cat", "cat", "dog"],
        "bbox": [[6, 4, 12, 8], [30, 10, 60, 30], [0, 0, 30, 20]],
    }
    assert said(rows[0]) == [
        "<image>\nFind every object in the picture.",
        "<ref-object><bbox>\n<ref-object><bbox>\n<ref-object><bbox>",
    ]
    assert said(rows[1])[1] == "There is none."
    assert out.splitlines()[0] == f"2 rows: {folder / 'rows.jsonl'}"
    assert set(out.splitlines()[1:]) == {
        "left out: 1 pictures that are not in the folder",
        "left out: 1 pictures of another size than the file says",
        "left out: 1 pictures that can't be opened",
        "left out: 1 crowds",
        "left out: 1 boxes without area in their picture",
    }


def test_refer_asks_for_the_boxes_of_a_name_but_not_of_a_crowd(folder, capsys):
    rows, out = written(folder, "refer", capsys)
    [row] = rows
    assert said(row) == [
        "<image>\nPlease provide the bounding box coordinate of the region this sentence describes: <ref-object>",
        "<bbox><bbox>",
    ]
    assert row["objects"] == {"ref": ["cat"], "bbox": [[6, 4, 12, 8], [30, 10, 60, 30]]}
    assert "left out: 1 names of crowds, in their picture" in out


def test_a_caption_is_the_name_of_its_box(folder, capsys):
    annotation = {"id": 1, "image_id": 1, "category_id": 7, "bbox": [0, 0, 30, 20], "caption": "the fat cat"}
    rows, _ = written(folder, "refer", capsys, content={**COCO, "annotations": [annotation]})
    assert rows[0]["objects"]["ref"] == ["the fat cat"]


def test_count_asks_for_what_is_there_and_for_what_is_not(folder, capsys):
    rows, _ = written(folder, "count", capsys, "--question", "Number of <ref-object>?")
    assert [(row["id"], row["objects"]["ref"], said(row)[1]) for row in rows] == [
        ("1", ["cat"], "2"),
        ("2", ["cat"], "0"),
    ]
    assert said(rows[0])[0] == "<image>\nNumber of <ref-object>?"


@pytest.mark.parametrize("task", ["detect", "refer", "count"])
def test_every_row_can_be_trained_on(folder, capsys, task):
    written(folder, task, capsys)
    rows = SupervisedDataset(folder / "rows.jsonl", processing("v2_6"))
    assert check_rows(rows, workers=0).min() > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"annotations": [{"id": 9, "image_id": 99}]},
            "annotation 9 has image_id 99, expected that of one of the 5",
        ),
        ({"annotations": [{"id": 9, "image_id": 1, "category_id": 0}]}, "annotation 9 has category_id 0"),
        (
            {"annotations": [{"id": 9, "image_id": 1, "category_id": 7, "bbox": [1, 2, 3]}]},
            r"annotation 9 has bbox \[1, 2, 3\], expected \[left, top, width, height\]",
        ),
        (
            {"annotations": None},
            "found images, categories, annotations, expected an object with the lists images",
        ),
        ({"images": [{"id": 1}]}, r"images\[0\] has no 'file_name'"),
    ],
)
def test_a_file_that_contradicts_itself_is_named_with_the_place(tmp_path, changes, message):
    (tmp_path / "coco.json").write_text(json.dumps({**COCO, **changes}))
    with pytest.raises(DataError, match=rf"coco\.json: {message}"):
        CocoFile(tmp_path / "coco.json", tmp_path)


def test_a_question_without_the_name_is_refused(folder):
    (folder / "coco.json").write_text(json.dumps(COCO))
    file = CocoFile(folder / "coco.json", folder / "images")
    with pytest.raises(DataError, match="--task refer expects one with <ref-object>"):
        next(file.rows("refer", folder=folder, question="Where?"))
    with pytest.raises(DataError, match="--task detect expects a question without <ref-object>"):
        next(file.rows("detect", folder=folder, question="Where is <ref-object>?"))


def test_no_rows_is_a_failure(folder, capsys):
    (folder / "coco.json").write_text(json.dumps({**COCO, "images": COCO["images"][2:3], "annotations": []}))
    command = [
        "coco",
        folder / "coco.json",
        "--images",
        folder,
        "--output",
        folder / "r.jsonl",
        "--task",
        "detect",
    ]
    assert convert_data.main([*map(str, command)]) == 1
    assert "left out: 1 pictures that are not in the folder" in capsys.readouterr().out


def test_an_unknown_form_is_refused_with_those_that_are_there(capsys):
    with pytest.raises(SystemExit):
        convert_data.main(["yolo"])
    assert "invalid choice: 'yolo' (choose from" in capsys.readouterr().err
