"""Data files of every format, read row by row, and broken ones refused with the place and the fixed line."""

import bz2
import gzip
import io
import json
import multiprocessing
import pickle
import subprocess
import sys
import time
import tracemalloc

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from minicpm_tune.data.files.json_rows import JsonRows, explain
from minicpm_tune.data.files.row_files import open_rows
from minicpm_tune.errors import DataError, RowError
from support.rows import chat, write_rows


def rows_of(count):
    return [{"id": number, "conversations": chat(f"q{number}", f"ä{number}")} for number in range(count)]


def all_of(rows):
    return [rows[index] for index in range(len(rows))]


def test_json_lists_and_jsonl_give_the_same_rows(tmp_path):
    expected = rows_of(5)
    lines = tmp_path / "rows.jsonl"
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in expected)
    lines.write_text("\ufeff" + text + "\n\n  \n", encoding="utf-8")
    compact = tmp_path / "rows.json"
    compact.write_text("\ufeff \n" + json.dumps(expected, indent=1), encoding="utf-8")
    assert all_of(open_rows(lines)) == expected
    assert all_of(open_rows(compact)) == expected


def test_rows_survive_pickling_and_a_changed_file_is_indexed_anew(tmp_path):
    path = write_rows(tmp_path, rows_of(3))
    rows = open_rows(path)
    assert all_of(pickle.loads(pickle.dumps(rows))) == rows_of(3)
    write_rows(tmp_path, rows_of(7))
    assert len(open_rows(path)) == 7


def read_often(rows, times, found):
    found.put(
        all(rows[index] == {"id": index, "pad": "x" * index} for _ in range(times) for index in range(50))
    )


def test_forked_workers_that_share_an_open_file_read_their_own_rows(tmp_path):
    expected = [{"id": index, "pad": "x" * index} for index in range(50)]
    rows = open_rows(write_rows(tmp_path, expected))
    assert rows[3] == expected[3]  # the file is open before the fork
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    workers = [context.Process(target=read_often, args=(rows, 200, found)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert [found.get(timeout=30) for _ in workers] == [True, True]
    for worker in workers:
        worker.join(timeout=30)


def test_the_index_is_read_again_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINICPMV_CACHE", str(tmp_path / "cache"))
    path = write_rows(tmp_path, rows_of(3))
    open_rows(path)
    assert sorted(file.suffix for file in (tmp_path / "cache").iterdir()) == [".items", ".npy"]
    monkeypatch.setattr(
        "minicpm_tune.data.files.json_rows._item_spans", lambda _: pytest.fail("parsed again")
    )
    assert all_of(open_rows(path)) == rows_of(3)


def test_an_unwritable_cache_folder_gives_way_to_a_temporary_one(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINICPMV_CACHE", str(tmp_path / "file" / "cache"))
    assert all_of(open_rows(write_rows(tmp_path, rows_of(2)))) == rows_of(2)


def test_many_rows_open_fast_once_indexed(tmp_path):
    path = tmp_path / "many.jsonl"
    with open(path, "w") as file:
        for number in range(300_000):
            file.write(f'{{"id": {number}}}\n')
    first = JsonRows(path)
    assert first[299_999] == {"id": 299_999}
    start = time.process_time()  # of this process alone: others may have the cores
    again = JsonRows(path)
    assert again[150_000] == {"id": 150_000}
    assert time.process_time() - start < 0.5
    tracemalloc.start()
    kept = JsonRows(path)
    assert len(kept) == 300_000
    assert tracemalloc.get_traced_memory()[0] < 100_000  # bytes: no object per row, the places are mapped
    tracemalloc.stop()


def test_a_broken_row_of_a_jsonl_file_is_that_rows_problem(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": 1}\n{"id": \'x\'}\n{"id": "\xff"}\n')
    rows = open_rows(path)
    assert rows[0] == {"id": 1}
    with pytest.raises(RowError, match=r"column 8: found a single quote") as caught:
        rows[1]
    assert 'fixed: {"id": "x"}' in str(caught.value)
    with pytest.raises(RowError, match="not UTF-8 text"):
        rows[2]


GUIDES = """[
  {
    "id": "0",
    "image": 'path/to/image_0.jpg',
    "conversations": [
      {
        'role': 'user',
        'content': '<image>\\nHow many desserts are on the white plate?'
      },
    ]
  },
]
"""


def test_the_broken_example_of_the_guides_is_refused_with_the_command_that_mends_it(tmp_path):
    path = tmp_path / "guides.json"
    path.write_text(GUIDES)
    with pytest.raises(DataError) as caught:
        open_rows(path)
    first, found, note, command = str(caught.value).splitlines()
    assert first.endswith("not valid JSON, line 4, column 14: found a single quote, expected a double quote.")
    assert found == "  found: \"image\": 'path/to/image_0.jpg',"
    assert note == "The file is a Python literal. To write it as JSON:"
    command = command.replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path, timeout=60)
    assert open_rows(tmp_path / "guides_fixed.json")[0]["conversations"][0]["role"] == "user"


def test_a_file_that_is_no_python_literal_either_gets_no_command(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("[{'a': true},]")
    with pytest.raises(DataError, match="found a single quote") as caught:
        open_rows(path)
    assert "Python" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"a": 1} {"b": 2}]', "line 1, column 11: found '{', expected a comma between two items."),
        ('[{"a": 1}', "found the end of the text, expected the rest of the value (is the file cut off?)"),
        ('[{"a": "x\ny"}]', "found a line break or control character inside a text"),
        ("[1] x", "found 'x', expected nothing more after the value"),
        ('{"a": 1},', "found a comma at the end, expected none after the last item"),
        ("[{id: 3}]", "found 'id', expected property name enclosed in double quotes"),
        (
            '[\n {"a": 1},\n]',
            "line 2, column 10: found a comma before ']', expected none after the last item",
        ),
    ],
)
def test_json_errors_are_explained(text, expected):
    with pytest.raises(json.JSONDecodeError) as caught:
        json.loads(text)
    assert expected in explain(text, caught.value)


@pytest.mark.parametrize(
    ("line", "fixed"),
    [
        ('{"a": True}', '{"a": true}'),
        ("{\"a\": \"it's\", 'b': 'don\\'t'}", '{"a": "it\'s", "b": "don\'t"}'),
        ('{"a": 1,}', '{"a": 1}'),
        ('{"a": 1},', '{"a": 1}'),
    ],
)
def test_a_python_literal_in_a_jsonl_row_is_shown_as_json(line, fixed, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(RowError) as caught:
        open_rows(path)[0]
    assert str(caught.value).splitlines()[-1] == f"  fixed: {fixed}"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.json", None, "no such file, expected rows"),
        ("empty.json", b"", "the file is empty"),
        ("blank.jsonl", b"\n\n", "the file has no rows"),
        ("list.json", b"[]", "the file has no rows"),
        ("latin.json", b'[{"a": "\xe9"}]', "not UTF-8 text"),
        ("object.json", b'{\n "a": [\n 1\n ]\n}\n', "does not end on its line, expected a JSON list"),
        ("rows.parquet", b"PAR1 nonsense", "not readable as Parquet"),
        ("none.parquet", None, "no such file"),
        (
            "windows.json",
            '[{"a": 1}]'.encode("utf-16"),
            "found UTF-16 text, expected JSON.*Save the file as UTF-8",
        ),
        ("big.json", '[{"a": 1}]'.encode("utf-16-be"), "found UTF-16 text, expected JSON"),
        (
            "rows.jsonl.gz",
            gzip.compress(b'{"a": 1}', mtime=0),
            "a file compressed with gzip.*Unpack it: gunzip --keep",
        ),
        ("rows.bz2", bz2.compress(b'{"a": 1}'), "a file compressed with bzip2"),
        ("rows.xlsx", b"PK\x03\x04", "a zip archive"),
        ("rows.pq", b"PAR1", "Give it a name that ends in .parquet"),
        ("several.jsonl", b'{"a":\n1}\n', r"the first row '\{\"a\":' does not end on its line"),
    ],
)
def test_files_that_are_no_data_are_refused(name, content, message, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_rows(path)


def picture_bytes():
    data = io.BytesIO()
    Image.new("RGB", (30, 20), (9, 9, 9)).save(data, "PNG")
    return data.getvalue()


def table(count):
    rows = [{**row, "image": {"bytes": picture_bytes(), "path": None}} for row in rows_of(count)]
    return pyarrow.Table.from_pylist(rows)


def test_parquet_files_and_folders_of_them(tmp_path):
    pyarrow.parquet.write_table(table(700), tmp_path / "train-0.parquet")
    pyarrow.parquet.write_table(table(3), tmp_path / "train-1.parquet")
    rows = open_rows(tmp_path)
    assert len(rows) == 703
    assert rows[699]["id"] == 699
    assert rows[702]["conversations"] == rows_of(3)[2]["conversations"]
    assert rows[5]["image"]["bytes"] == picture_bytes()
    assert len(open_rows(tmp_path / "train-*.parquet")) == 703
    assert pickle.loads(pickle.dumps(rows))[701]["id"] == 1


def test_workers_read_parquet_rows_as_their_parent_does(tmp_path):
    pyarrow.parquet.write_table(table(40), tmp_path / "rows.parquet")
    rows = open_rows(tmp_path / "rows.parquet")
    expected = [row["id"] for row in all_of(rows)]
    loader = DataLoader(rows, batch_size=5, num_workers=2, collate_fn=list, timeout=60)
    assert [row["id"] for batch in loader for row in batch] == expected == list(range(40))


def test_a_folder_with_several_splits_is_refused(tmp_path):
    for split in ("train", "test"):
        pyarrow.parquet.write_table(table(2), tmp_path / f"{split}-0.parquet")
    with pytest.raises(DataError, match="holds the splits test, train, expected one"):
        open_rows(tmp_path)


def test_saved_hugging_face_data_sets(tmp_path):
    saved = datasets.Dataset.from_list(rows_of(6)).select([4, 1])
    saved.save_to_disk(str(tmp_path / "one"))
    assert all_of(open_rows(tmp_path / "one")) == [rows_of(6)[4], rows_of(6)[1]]
    datasets.DatasetDict(train=saved).save_to_disk(str(tmp_path / "dict"))
    assert len(open_rows(tmp_path / "dict")) == 2
    datasets.DatasetDict(train=saved, test=saved).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(DataError, match="holds the splits train, test, expected one"):
        open_rows(tmp_path / "two")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="holds no Parquet files and no data set saved"):
        open_rows(tmp_path / "nothing")
