"""A large file is checked once: what was found is used again exactly as long as it holds."""

import json

import numpy as np
import pytest
from PIL import Image

from dataset import SupervisedDataset
from minicpm_tune.data import row_check
from minicpm_tune.data.row_check import FileCheck, Finding, check_path, check_rows
from minicpm_tune.errors import DataError
from support.check_on_two_ranks import on_two_ranks
from support.golden_checkpoints import processing
from support.rows import chat

ROWS = 60
LOOKED_AT = 6


@pytest.fixture
def looks(monkeypatch, tmp_path):
    """The rows that were looked at; files of ten rows count as large."""
    monkeypatch.setattr(row_check, "STORED_FROM", 10)
    monkeypatch.setattr(row_check, "_LOOKED_AT", LOOKED_AT)
    monkeypatch.setenv("MINICPMV_CACHE", str(tmp_path / "cache"))
    found, check_row = [], row_check.check_row
    monkeypatch.setattr(
        row_check, "check_row", lambda rows, index: found.append(index) or check_row(rows, index)
    )
    return found


def write(folder, *, rows=ROWS, name="rows.jsonl", answer="Yes."):
    Image.new("RGB", (40, 30), "red").save(folder / "all.png")
    lines = []
    for number in range(rows):
        (folder / "own").mkdir(exist_ok=True)
        image = "all.png" if number % 10 else f"own/{number}.png"
        if number % 10 == 0:
            Image.new("RGB", (40, 30)).save(folder / image)
        lines.append(json.dumps({"image": image, "conversations": chat("Red? " * (number % 7 + 1), answer)}))
    (folder / name).write_text("\n".join(lines))
    return folder / name


def opened(path, name="v2_6", **options):
    return SupervisedDataset(path, processing(name, **{"check_images": "header", **options}))


def checked(path, looks, name="v2_6", **options):
    """The checked data set, and how many rows were looked at for it."""
    looks.clear()
    rows = opened(path, name, **options)
    rows.lengths = check_rows(rows)
    return rows, len(looks)


def test_a_file_that_was_checked_is_only_sampled_the_next_time(tmp_path, looks):
    path = write(tmp_path)
    first, number = checked(path, looks)
    assert number == ROWS
    second, number = checked(path, looks)
    assert number == LOOKED_AT
    assert np.array_equal(first.lengths, second.lengths)
    assert second.lengths.dtype == np.int32


def test_what_the_check_depends_on_makes_it_anew(tmp_path, looks, monkeypatch):
    path = write(tmp_path)
    checked(path, looks)
    assert checked(path, looks, model_max_length=500)[1] == ROWS
    assert checked(path, looks, "v4_5")[1] == ROWS
    assert checked(path, looks, on_bad_row="skip")[1] == LOOKED_AT
    write(tmp_path, answer="No, it is not.")
    assert checked(path, looks)[1] == ROWS
    monkeypatch.setattr(row_check, "_program", lambda: "another version")
    assert checked(path, looks)[1] == ROWS


def test_only_the_new_file_of_a_mixture_is_checked(tmp_path, looks):
    first = write(tmp_path)
    alone = checked(first, looks)[0].lengths
    second = write(tmp_path, rows=20, name="more.jsonl", answer="Perhaps, perhaps not.")
    rows, number = checked(f"{second},{first}", looks)
    assert number == LOOKED_AT + 20
    assert np.array_equal(rows.lengths[20:], alone)
    assert checked(f"{first},{second}", looks)[1] == 2 * LOOKED_AT


def test_images_that_are_gone_have_the_whole_file_checked(tmp_path, looks):
    path = write(tmp_path)
    checked(path, looks)
    (tmp_path / "all.png").unlink()
    with pytest.raises(DataError, match="54 of 60 rows can't be used"):
        checked(path, looks)


def test_rows_that_were_mended_are_used_again(tmp_path, looks):
    path = write(tmp_path)
    (tmp_path / "own" / "10.png").unlink()
    (tmp_path / "own" / "20.png").unlink()
    assert checked(path, looks, on_bad_row="skip")[0].left_out == {10, 20}
    again, number = checked(path, looks, on_bad_row="skip")
    assert again.left_out == {10, 20}
    assert number <= LOOKED_AT + 2
    Image.new("RGB", (40, 30)).save(tmp_path / "own" / "10.png")
    mended = checked(path, looks, on_bad_row="skip")[0]
    assert mended.left_out == {20}
    assert mended.lengths[10] == checked(write(tmp_path), looks)[0].lengths[10]


def test_findings_survive_the_file(tmp_path, looks):
    path = write(tmp_path)
    (tmp_path / "own" / "0.png").unlink()
    rows = checked(path, looks, on_bad_row="skip")[0]
    found = FileCheck.load(check_path(rows, 0, decoded=False))
    assert list(found.bad) == [0]
    assert found.bad[0].bad.kind == "missing image"
    assert found.bad[0] == Finding(1, rows.describe(0, _error(rows, 0)))


def _error(rows, index):
    with pytest.raises(ValueError, match=r"0\.png") as caught:
        rows.plan(index)
    return caught.value


def test_several_processes_use_what_was_found_before(tmp_path, monkeypatch):
    monkeypatch.setenv("MINICPMV_CACHE", str(tmp_path / "cache"))
    text = json.dumps({"conversations": chat("Yes?", "No.")})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([text] * row_check.STORED_FROM))
    rows = SupervisedDataset(path, processing("v2_6", model_max_length=512))
    lengths = np.full(row_check.STORED_FROM, len(rows.plan(0).encoded.input_ids), dtype=np.int32)
    bad = {7: Finding(1, rows.describe(7, OfAKindError("odd")), dropped=True)}
    FileCheck(lengths, bad).save(check_path(rows, 0, decoded=False))
    found = on_two_ranks(path, "skip")
    # Row 7 is good now, and what the first process saw of it is what both use.
    assert found[0] == found[1] == {"lengths": lengths.tolist(), "left_out": []}


class OfAKindError(ValueError):
    kind = "test"
