"""``--columns`` and CSV files: any table becomes rows, and a name that fits nothing is said with those found."""

import csv
import json

import datasets
import pytest
from PIL import Image

from dataset import SupervisedDataset
from minicpm_tune.data.files.row_forms import read_columns
from minicpm_tune.errors import DataError, RowError
from support.golden_checkpoints import processing, supervised_text

NAMES = {"image_path": "image", "prompt": "user", "reply": "assistant", "score": "weight"}
TABLE = [
    {"image_path": "a.png", "prompt": "Which color?", "reply": "Red,\nand \"more\".", "score": "0.5", "note": "x"},
    {"image_path": "", "prompt": "NA?", "reply": "None", "score": "", "note": "007"},
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    Image.new("RGB", (40, 30), "red").save(folder / "a.png")
    Image.new("RGB", (30, 40), "blue").save(folder / "b.png")
    return folder


def write_csv(path, rows, delimiter=","):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def typed():
    return [
        {**row, "score": float(row["score"] or 1), "image_path": row["image_path"] or None} for row in TABLE
    ]


def write(folder, kind):
    path = folder / f"table.{kind}"
    if kind in ("csv", "tsv"):
        write_csv(path, TABLE, "\t" if kind == "tsv" else ",")
    elif kind == "parquet":
        datasets.Dataset.from_list(typed()).to_parquet(path)
    elif kind == "saved":
        datasets.Dataset.from_list(typed()).save_to_disk(path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in typed()))
    else:
        path.write_text(json.dumps(typed()))
    return path


def opened(path, names, **options):
    columns = None if names is None else json.dumps(names)
    return SupervisedDataset(path, processing("v2_6", columns=columns, **options))


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "saved", "jsonl", "json"])
def test_a_table_of_any_kind_gives_the_same_rows(folder, kind):
    rows = opened(write(folder, kind), NAMES, image_folder=str(folder))
    first, second = rows[0], rows[1]
    assert supervised_text(first, rows.processing.tokenizer) == 'Red,\nand "more".<|im_end|>'
    assert supervised_text(second, rows.processing.tokenizer) == "None<|im_end|>"
    assert (len(first["tgt_sizes"]), len(second["tgt_sizes"])) == (1, 0)
    assert set(first["loss_weights"][first["labels"] != -100].tolist()) == {0.5}
    assert rows.parse(0).unknown_keys == ("row 'note'",)


def test_cells_of_a_csv_file_hold_lists_and_objects(folder):
    row = {
        "images": "['a.png', 'b.png']",  # as pandas writes it
        "question": "Which of <image> and <image>?",
        "answers": '["b", "a", "b"]',
        "history": '[["1?", "One."]]',
    }
    rows = opened(write_csv(folder / "cells.csv", [row]), None)
    assert [source.value for source in rows.parse(0).sources] == ["a.png", "b.png"]
    assert [turn.text for turn in rows.parse(0).turns] == ["1?", "One.", "Which of  and ?", "b"]
    broken = opened(write_csv(folder / "broken.csv", [{**row, "images": "[a.png"}, row]), None)
    with pytest.raises(RowError, match=r"'images' is '\[a.png', which is neither JSON nor a Python literal"):
        broken.parse(0)
    heavy = opened(write_csv(folder / "heavy.csv", [{**row, "weight": "much"}]), None)
    with pytest.raises(RowError, match="'weight' is 'much', expected a number"):
        heavy.parse(0)


def test_each_file_of_a_mixture_is_renamed_where_it_has_the_columns(folder):
    write_csv(folder / "one.csv", [{"q": "1?", "a": "One."}])
    (folder / "two.jsonl").write_text(json.dumps({"frage": "2?", "antwort": "Two."}) + "\n")
    (folder / "three.json").write_text(json.dumps([{"query": "3?", "response": "Three."}]))
    names = {"q": "user", "a": "assistant", "frage": "user", "antwort": "assistant"}
    rows = opened(",".join(str(folder / name) for name in ("one.csv", "two.jsonl", "three.json")), names)
    assert [rows.parse(index).turns[-1].text for index in range(3)] == ["One.", "Two.", "Three."]


def test_rows_in_the_official_form_need_no_column(folder):
    row = {"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (folder / "official.json").write_text(json.dumps([row]))
    assert opened(folder / "official.json", NAMES).parse(0).turns[1].text == "b"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            {"prompts": "user"},
            r"no column 'prompts' in .*table.csv, expected those found: 'image_path', 'prompt', ",
        ),
        (NAMES | {"note": "user"}, "would have two columns 'user', 'prompt' and 'note', expected one"),
        ({"prompt": "note"}, "'prompt' is to be 'note', expected one of answer, answers, assistant, "),
    ],
)
def test_a_wrong_column_is_an_error_with_the_columns_found(folder, names, message):
    with pytest.raises(DataError, match=message):
        opened(write(folder, "csv"), names)


def test_a_column_that_takes_the_name_of_another_is_refused(folder):
    path = write_csv(
        folder / "both.csv", [{"image": "a.png", "image_path": "b.png", "query": "?", "response": "!"}]
    )
    with pytest.raises(DataError, match="two columns 'image', 'image' and 'image_path'"):
        opened(path, {"image_path": "image"})
    (folder / "both.jsonl").write_text(json.dumps({"image": "a.png", "image_path": "b.png"}) + "\n")
    with pytest.raises(RowError, match="the row has two values for 'image', expected one"):
        opened(folder / "both.jsonl", {"image_path": "image"}).parse(0)


@pytest.mark.parametrize("text", ["{'a': 'user'}", "[]", "{}", '{"a": 1}'])
def test_columns_that_are_no_names_are_refused(text):
    with pytest.raises(DataError, match=r"--columns .*expected"):
        read_columns(text)


def test_a_csv_file_with_uneven_lines_is_refused(folder):
    (folder / "uneven.csv").write_text("query,response\na,b\nc,d,e,f\n")
    with pytest.raises(
        DataError, match=r"uneven.csv: not readable as CSV .*Expected 2 fields in line 3, saw 4"
    ):
        opened(folder / "uneven.csv", None)


@pytest.mark.parametrize("text", ["query,query\na,b\n", "query,response\na,b,c\n", "query,\na,b\n"])
def test_a_csv_file_whose_columns_have_no_name_of_their_own_is_refused(folder, text):
    (folder / "names.csv").write_text(text)
    with pytest.raises(DataError, match="expected a name for each column, all different"):
        opened(folder / "names.csv", None)


def test_a_csv_file_may_begin_with_a_byte_order_mark_and_hold_empty_lines(folder):
    (folder / "mark.csv").write_bytes("\ufeffquery,response\nWas?,Größe\n\nb?,c\n".encode())
    rows = opened(folder / "mark.csv", None)
    assert [rows.parse(index).turns[1].text for index in range(2)] == ["Größe", "c"]
    (folder / "latin.csv").write_bytes("query,response\nWas?,Größe\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.csv: not readable as CSV .*Save it as UTF-8"):
        opened(folder / "latin.csv", None)
