"""The check of the rows when several ranks share it."""

from dataset import SupervisedDataset
from minicpm_tune.data.row_check import check_rows
from support.check_on_two_ranks import on_two_ranks
from support.golden_checkpoints import processing
from support.rows import BAD_ROWS, good, write_rows


def test_every_rank_knows_all_lengths_and_all_bad_rows(tmp_path):
    path = write_rows(tmp_path, [*BAD_ROWS, good(6), *BAD_ROWS[1:3], good(9)])
    alone = SupervisedDataset(path, processing("v2_6", model_max_length=512, on_bad_row="skip"))
    expected = {"lengths": check_rows(alone).tolist(), "left_out": [1, 2, 3, 4, 5, 7, 8]}
    assert on_two_ranks(path, "skip") == [expected, expected]
    first, second = on_two_ranks(path, "error")
    assert first == second
    assert first["error"].startswith("7 of 10 rows can't be used:")
