"""The check of the rows: what it counts, and several ranks that share it."""

import pytest

from dataset import SupervisedDataset
from minicpm_tune.data import row_check
from minicpm_tune.data.row_check import check_rows
from support.check_on_two_ranks import on_two_ranks
from support.golden_checkpoints import processing
from support.rows import BAD_ROWS, chat, good, write_rows


def test_every_rank_knows_all_lengths_and_all_bad_rows(tmp_path):
    path = write_rows(tmp_path, [*BAD_ROWS, good(6), *BAD_ROWS[1:3], good(9)])
    alone = SupervisedDataset(path, processing("v2_6", model_max_length=512, on_bad_row="skip"))
    expected = {"lengths": check_rows(alone).tolist(), "left_out": [1, 2, 3, 4, 5, 7, 8]}
    assert on_two_ranks(path, "skip") == [expected, expected]
    first, second = on_two_ranks(path, "error")
    assert first == second
    assert first["error"].startswith("7 of 10 rows can't be used:")


def odd_rows(count):
    """Rows with keys that nothing reads, empty answers and ids that stand twice."""
    rows = [{"id": number // 2, "license": "MIT", "messages": chat("Hi", "Yes")} for number in range(count)]
    rows[3]["messages"] = chat("Hi", "")
    rows[4]["messages"] = [{"role": "user", "name": "Ann", "content": "Hi"}, *chat("Hi", "Yes")[1:]]
    return rows


EXPECTED = (
    "Keys that nothing reads: row 'license' (6 rows), message 'name' (1 rows). Check",
    "1 rows have an empty answer",
    "6 rows share their 'id' with another row",
)


def test_odd_rows_are_counted_once_and_are_no_problem(tmp_path, caplog):
    rows = SupervisedDataset(write_rows(tmp_path, odd_rows(6)), processing("v2_6"))
    assert len(check_rows(rows)) == 6
    for text in EXPECTED:
        assert caplog.text.count(text) == 1, text


def test_what_was_odd_is_told_again_from_the_stored_check(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("MINICPMV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(row_check, "STORED_FROM", 6)
    path = write_rows(tmp_path, odd_rows(6))
    check_rows(SupervisedDataset(path, processing("v2_6", check_images="header")))
    caplog.clear()
    monkeypatch.setattr(row_check, "_check_shared", lambda *_, **__: pytest.fail("checked again"))
    check_rows(SupervisedDataset(path, processing("v2_6", check_images="header")))
    for text in EXPECTED:
        assert caplog.text.count(text) == 1, text


def test_ordinary_rows_are_checked_without_a_word(tmp_path, caplog):
    check_rows(SupervisedDataset(write_rows(tmp_path, [good(0), good(1)]), processing("v2_6")))
    assert not [record for record in caplog.records if record.name.endswith("row_check")]


def test_rows_left_out_are_told_once(tmp_path, caplog):
    rows = SupervisedDataset(
        write_rows(tmp_path, BAD_ROWS), processing("v2_6", model_max_length=512, on_bad_row="skip")
    )
    check_rows(rows)
    assert caplog.text.count("5 of 6 rows are left out, 0 of them as over-long") == 1
