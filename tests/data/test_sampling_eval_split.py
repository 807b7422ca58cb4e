"""``--eval_split``: no picture on both sides, the same wherever it is worked out, and stable as the data grows."""

import base64
import json
import random
import shutil

import numpy as np
import pytest
from PIL import Image

from dataset import SupervisedDataset
from minicpm_tune.data.row_check import check_rows
from minicpm_tune.data.sampling import (
    choose_groups,
    first_of_each_file,
    group_rows,
    held_out_rows,
    identities,
)
from minicpm_tune.errors import DataError
from support.golden_checkpoints import processing
from support.rows import chat

ROWS = 60


def draw(folder, count):
    folder.mkdir(exist_ok=True)
    for number in range(count):
        Image.new("RGB", (20, 20), (number, 2 * number, 99)).save(folder / f"{number}.png")


def two_rows_for_each_picture(count=ROWS, first=0):
    return [
        {"id": n, "image": f"{n // 2}.png", "conversations": chat(f"<image>\n{n}?", f"It is {n}.")}
        for n in range(first, first + count)
    ]


def opened(folder, rows, name="rows.jsonl", **options):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SupervisedDataset(folder / name, processing("v2_6", **options))


def held_out_ids(rows, share, seed=0):
    held_out = held_out_rows(rows, share, seed=seed)
    return {rows.mixture.read(index)["id"] for index in np.flatnonzero(held_out).tolist()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    draw(folder, 60)
    return folder


@pytest.mark.parametrize("share", [0.2, 15])
def test_no_picture_stands_on_both_sides(folder, share):
    ids = held_out_ids(opened(folder, two_rows_for_each_picture()), share)
    assert all((n ^ 1) in ids for n in ids)  # both rows of a picture
    assert len(ids) == 14 if share == 15 else 4 <= len(ids) <= 24


def test_with_a_fraction_a_row_keeps_its_side_when_rows_are_added_moved_or_mixed(folder, tmp_path):
    before = held_out_ids(opened(folder, two_rows_for_each_picture()), 0.3)
    grown = two_rows_for_each_picture(ROWS) + two_rows_for_each_picture(40, first=ROWS)
    random.Random(3).shuffle(grown)
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    after = held_out_ids(opened(moved, grown, "grown.jsonl"), 0.3)
    assert before
    assert {n for n in after if n < ROWS} == before
    assert held_out_ids(opened(folder, two_rows_for_each_picture()), 0.3, seed=1) != before


def test_the_same_picture_is_known_as_a_path_a_copy_bytes_and_a_data_uri(folder):
    data = (folder / "3.png").read_bytes()
    (folder / "copy.png").write_bytes(data)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    sources = ["3.png", str(folder / "3.png"), "copy.png", uri, "4.png"]
    rows = opened(folder, [{"image": each, "conversations": chat("?", "!")} for each in sources])
    found = [identities(rows, index) for index in range(len(sources))]
    assert len(set(found[:4])) == 1
    assert found[4] != found[0]


def test_rows_that_share_a_picture_through_others_are_one_group():
    assert group_rows([[1], [2, 3], [4], [3, 1], [9], [4, 9]]) == [1, 1, 4, 1, 4, 4]


def test_rows_without_media_stand_by_their_own_text(folder):
    rows = [{"id": n, "conversations": chat(f"{n % 10}?", f"It is {n % 10}.")} for n in range(40)]
    ids = held_out_ids(opened(folder, rows), 0.3)
    assert 0 < len(ids) < 40
    assert {n % 10 for n in ids}.isdisjoint({n % 10 for n in range(40) if n not in ids})


def test_bad_rows_count_on_neither_side(folder):
    good = two_rows_for_each_picture(4)
    bad = [
        {"id": 100, "conversations": "none"},
        {"id": 101, "image": "no.png", "conversations": chat("?", "!")},
    ]
    rows = opened(folder, [*bad, *good], on_bad_row="skip")
    check_rows(rows)
    assert held_out_ids(rows, 2) in ({0, 1}, {2, 3})


def test_a_count_passes_over_groups_that_are_too_large():
    sizes = dict.fromkeys(range(20), 1) | {50: 100}
    for seed in range(5):
        chosen = choose_groups(sizes, 10, seed=seed)
        assert len(chosen) == 10
        assert 50 not in chosen


def test_a_fraction_too_small_for_the_data_still_holds_a_group_out():
    assert len(choose_groups({1: 3, 2: 4}, 1e-9, seed=0)) == 1


def test_a_split_that_leaves_a_side_empty_is_refused(folder):
    with pytest.raises(DataError, match="leaves none for the training"):
        choose_groups({1: 3, 2: 4}, 7, seed=0)
    with pytest.raises(DataError, match=r"the largest has 4 rows\), which leaves none for the evaluation"):
        choose_groups({1: 3, 2: 4}, 2, seed=0)
    rows = [{"image": "0.png", "conversations": chat(f"{n}?", "!")} for n in range(5)]
    with pytest.raises(DataError, match="found 5 rows that can be used, in 1 group, expected at least two"):
        held_out_rows(opened(folder, rows), 0.5, seed=0)


def test_the_first_held_out_rows_of_each_file_are_kept():
    held_out = np.array([True, False, True, True, False, True, True])
    kept = first_of_each_file(held_out, [4, 7], 1)
    assert np.flatnonzero(kept).tolist() == [0, 5]
    assert first_of_each_file(held_out, [4, 7], None).tolist() == held_out.tolist()
