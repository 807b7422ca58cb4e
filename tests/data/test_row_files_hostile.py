"""Data files made to harm: nothing in them runs, hangs or ends the program; each is one named problem."""

import io
import json
import os
import pickle
import struct
import time
import zlib

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from dataset import SupervisedDataset
from minicpm_tune.data.bad_rows import BadRowLog
from minicpm_tune.data.files.row_files import open_rows
from minicpm_tune.data.media.images import ImageOptions, open_image
from minicpm_tune.data.row_check import check_rows
from minicpm_tune.errors import DataError, RowError
from support.golden_checkpoints import processing
from support.hostile import ODD, Bomb
from support.rows import chat, good, write_rows


def bombed_table(mark, *, schema_too):
    """A column that asks its reader to unpickle what it carries, and one of pickled bytes."""
    bomb = pickle.dumps(Bomb(mark))
    asks = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": bomb}
    column = pyarrow.array([b"x"], pyarrow.binary())
    fields = [pyarrow.field("id", pyarrow.binary(), metadata=asks), pyarrow.field("image", pyarrow.binary())]
    schema = pyarrow.schema(fields, metadata={"huggingface": bomb, "pandas": bomb} if schema_too else None)
    return pyarrow.Table.from_arrays([column, pyarrow.array([bomb], pyarrow.binary())], schema=schema)


def write_parquet(table, folder):
    pyarrow.parquet.write_table(table, folder / "rows.parquet")
    return folder / "rows.parquet"


def write_saved(table, folder):
    """As Hugging Face datasets would have saved it, with a script beside it."""
    folder = folder / "saved"
    datasets.Dataset.from_dict({"id": [b"x"], "image": [b"y"]}).save_to_disk(str(folder))
    [file] = folder.glob("*.arrow")
    with pyarrow.ipc.new_stream(str(file), table.schema) as stream:
        stream.write_table(table)
    (folder / f"{folder.name}.py").write_text("raise SystemExit('a script ran')\n")
    return folder


@pytest.mark.parametrize("write", [write_parquet, write_saved])
def test_nothing_in_a_table_is_unpickled(tmp_path, write):
    mark = tmp_path / "mark"
    rows = open_rows(write(bombed_table(mark, schema_too=False), tmp_path))
    assert len(rows) == 1
    with pytest.raises(RowError, match="in no format that Pillow knows"):
        open_image(rows[0]["image"], ImageOptions(folder=tmp_path))
    assert not mark.exists()


@pytest.mark.parametrize("write", [write_parquet, write_saved])
def test_a_table_whose_description_is_a_pickle_is_refused(tmp_path, write):
    mark = tmp_path / "mark"
    with pytest.raises(DataError, match=r"not readable as (Parquet|Arrow)"):
        open_rows(write(bombed_table(mark, schema_too=True), tmp_path))
    assert not mark.exists()


def beside_a_deep_one(folder, depth):
    """A good row and one that nests, as JSONL and as a list."""
    row = json.dumps(good(1))[:-1] + ', "deep": ' + "[" * depth + "]" * depth + "}"
    (folder / "rows.jsonl").write_text(f"{json.dumps(good(0))}\n{row}\n")
    (folder / "rows.json").write_text(f"[{json.dumps(good(0))}, {row}]")
    return folder / "rows.jsonl", folder / "rows.json"


def checked(path):
    """Where the samples of a checked file are from (None for a row that is left out), and why rows are left out."""
    data = SupervisedDataset(path, processing("v2_6", model_max_length=512, on_bad_row="skip"))
    data.bad_rows = BadRowLog(path.with_name("bad_rows.jsonl"))
    check_rows(data)
    origins = [data[index]["origin"] for index in (0, 1)]
    return origins, {bad["row"]: bad["reason"] for bad in data.bad_rows.read()}


TOO_DEEP = "the row is nested too deeply, expected a conversation. Remove it."


@pytest.mark.parametrize("depth", [100, 500, 800])
def test_rows_that_nest_are_read(tmp_path, depth):
    for path in beside_a_deep_one(tmp_path, depth):
        assert checked(path) == ([(0, 0), (0, 1)], {})


def test_rows_that_nest_too_deeply_are_named(tmp_path):
    lines, listed = beside_a_deep_one(tmp_path, 100_000)
    assert checked(lines) == ([(0, 0), None], {1: TOO_DEEP})
    with pytest.raises(DataError, match="nested too deeply"):
        open_rows(listed)


@pytest.mark.parametrize("depth", range(820, 1000, 9))
def test_at_the_limit_a_row_is_read_or_named(tmp_path, depth):
    """How deep Python reads also depends on how deep its own calls are at that moment."""
    lines, _ = beside_a_deep_one(tmp_path, depth)
    origins, bad = checked(lines)
    assert origins == [(0, 0), None if bad else (0, 1)]
    assert set(bad.items()) <= {(1, TOO_DEEP)}


def test_a_deep_conversation_is_named(tmp_path):
    row = good(1)
    for _ in range(400):
        row["conversations"] = [row["conversations"]]
    path = write_rows(tmp_path, [good(0), row])
    data = SupervisedDataset(path, processing("v2_6", model_max_length=512))
    with pytest.raises(DataError, match="1 of 2 rows can't be used") as caught:
        check_rows(data)
    assert len(str(caught.value)) < 10_000


LONG = 2**25  # characters; benchmarks/RESULTS.md has 1 GiB
SECONDS = 60  # 1 to 2, alone on the machine


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x" * LONG, "line 1, column 1: found 'xxxxxxxxxxxxxxxxxxxx', expected value"),
        ("\0" * LONG, "not UTF-8 text"),
        ('{"id": "' + "x" * LONG, "inside a text"),
        ("{'id': '" + "x" * LONG + "'}", "found a single quote, expected a double quote"),
        (
            '{"conversations": [{"role": "user", "content": "' + "x" * LONG + '"}]}',
            "expected at most 10000000",
        ),
        ('{"conversations": [{"role": "' + "x" * LONG + '", "content": ""}]}', "expected 'user'"),
    ],
    ids=["letters", "zeros", "cut", "quotes", "text", "role"],
)
def test_an_endless_line_is_one_short_message(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(good(0))}\n{content}\n")
    data = SupervisedDataset(path, processing("v2_6", model_max_length=512))
    start = time.monotonic()
    with pytest.raises(DataError, match="1 of 2 rows can't be used") as caught:
        check_rows(data)
    assert time.monotonic() - start < SECONDS
    assert len(str(caught.value)) < 10_000
    caught.match(message)


@pytest.mark.parametrize("key", ["id", "license", "image_path", "system", "objects"])
def test_deep_values_under_any_key_are_read_or_named(tmp_path, key):
    deep = "[" * 900 + "]" * 900
    lines = tmp_path / "rows.jsonl"
    lines.write_text(
        f'{{"{key}": {deep}, "messages": {json.dumps(chat("Hi", "Yes"))}}}\n{{"{key}": {deep}}}\n{json.dumps(good())}\n'
    )
    data = SupervisedDataset(lines, processing("v2_6", on_bad_row="skip"))
    check_rows(data)
    assert {1} <= data.left_out <= {0, 1}


@pytest.mark.parametrize("key", ["role", "content", "weight", "thinking", "index", "image", "fps"])
def test_deep_values_in_a_message_or_part_are_named(tmp_path, key):
    deep = "[" * 900 + "]" * 900
    part = f'{{"type": "video", "{key}": {deep}}}'
    message = (
        f'{{"role": "user", "content": [{part}]}}'
        if key in ("index", "image", "fps")
        else f'{{"{key}": {deep}}}'
    )
    lines = tmp_path / "rows.jsonl"
    lines.write_text(f'{{"video": "a.mp4", "messages": [{message}, {message}]}}\n{json.dumps(good())}\n')
    data = SupervisedDataset(lines, processing("v2_6", on_bad_row="skip"))
    check_rows(data)
    assert data.left_out == {0}


def test_a_list_without_end_is_refused(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("[" * LONG)
    with pytest.raises(DataError, match="nested too deeply"):
        open_rows(path)


def png(*chunks):
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, data in chunks:
        parts += [struct.pack(">I", len(data)), kind, data, struct.pack(">I", zlib.crc32(kind + data))]
    return b"".join(parts)


def header(width, height):
    return b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)


def open_and_decode(data, folder):
    return open_image(data, ImageOptions(folder=folder)).frames()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            png(header(2**31 - 1, 2**31 - 1), (b"IDAT", b"")),
            "2147483647 x 2147483647 pixels, expected at most",
        ),
        (png(header(10_000, 10_000), (b"IDAT", zlib.compress(bytes(1000)))), "can't be decoded"),
        (png(header(4, 4), (b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))), "can't be decoded"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n%%EOF\n", "no format that Pillow knows"),
    ],
    ids=["header", "short", "text chunk", "PostScript"],
)
def test_image_bombs_are_named(tmp_path, data, message):
    with pytest.raises(RowError, match=message):
        open_and_decode(data, tmp_path)


@pytest.fixture
def odd_folder(tmp_path):
    folder = tmp_path / ODD
    folder.mkdir()
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(buffer, "PNG")
    (folder / f"{ODD}.png").write_bytes(buffer.getvalue())
    return folder


def test_odd_names_of_images_and_data_files_are_names(odd_folder, tmp_path):
    (odd_folder / "link").symlink_to(f"{ODD}.png")
    (tmp_path / "way").symlink_to(odd_folder)
    images = [f"{ODD}.png", "link", str(tmp_path / "way" / "link"), f"../{ODD}/{ODD}.png"]
    rows = [{**good(number), "image": name} for number, name in enumerate(images)]
    path = odd_folder / f"{ODD}.json"
    path.write_text(json.dumps(rows))
    data = SupervisedDataset(path, processing("v2_6", model_max_length=512))
    check_rows(data)
    assert all(data[index]["pixel_values"].shape[-1] > 0 for index in range(len(rows)))


@pytest.mark.parametrize("name", ["pipe", "loop", "zero", "folder"])
def test_what_is_no_file_is_never_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    found = "is a folder" if name == "folder" else "not found"
    with pytest.raises(RowError, match=f"image '{name}' {found}"):
        open_and_decode(name, tmp_path)
    if name != "folder":
        with pytest.raises(DataError, match=r"no such file|is empty"):
            open_rows(tmp_path / name)
