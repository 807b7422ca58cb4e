"""Mixtures: exact counts per epoch, drawn without replacement, the same everywhere."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset import SupervisedDataset
from minicpm_tune.data.files.row_files import epoch_order
from minicpm_tune.errors import DataError
from minicpm_tune.settings.data_arguments import DataArguments, MixtureSource, read_data_path
from support.golden_checkpoints import processing
from support.rows import chat, write_rows


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 100)), min_size=1, max_size=4),
    st.integers(0, 5),
    st.integers(0, 3),
    st.booleans(),
)
def test_every_source_gives_exactly_its_count_in_whole_passes_and_a_remainder(sources, seed, epoch, shuffle):
    sizes, counts = zip(*sources, strict=True)
    order = epoch_order(sizes, counts, seed=seed, epoch=epoch, shuffle=shuffle)
    assert len(order) == sum(counts)
    seen = Counter(order.tolist())
    first = 0
    for size, count in sources:
        times = [seen[first + row] for row in range(size)]
        assert sum(times) == count
        assert set(times) <= {count // size, count // size + 1}
        first += size


def test_each_epoch_draws_anew_and_the_seed_repeats_it():
    def draw(seed, epoch):
        return epoch_order([50, 10], [20, 25], seed=seed, epoch=epoch, shuffle=True).tolist()

    assert draw(1, 0) == draw(1, 0)
    assert draw(1, 0) != draw(1, 1)
    assert draw(1, 0) != draw(2, 0)
    drawn = [set(epoch_order([50], [20], seed=0, epoch=epoch, shuffle=True).tolist()) for epoch in range(3)]
    assert drawn[0] != drawn[1] != drawn[2]
    # fixed for ever: a resumed run must see the same rows on another machine
    assert epoch_order([5, 3], [7, 2], seed=3, epoch=1, shuffle=True).tolist() == [4, 7, 2, 3, 1, 4, 0, 1, 5]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.json", [MixtureSource(Path("a.json"))]),
        ("a.json#500", [MixtureSource(Path("a.json"), count=500)]),
        ("a.json:0.3", [MixtureSource(Path("a.json"), weight=0.3)]),
        (
            "a.json:2, b c.jsonl#7,d",
            [
                MixtureSource(Path("a.json"), weight=2.0),
                MixtureSource(Path("b c.jsonl"), count=7),
                MixtureSource(Path("d")),
            ],
        ),
        (r"C:\data\a.json", [MixtureSource(Path(r"C:\data\a.json"))]),
    ],
)
def test_paths_with_amounts(text, expected):
    assert read_data_path(text) == expected


def test_a_file_whose_name_looks_like_an_amount_is_that_file(tmp_path):
    for name in ("a#5", "b:2", "c,d"):
        (tmp_path / name).write_text("x")
        assert read_data_path(str(tmp_path / name)) == [MixtureSource(tmp_path / name)]


def test_windows_paths_in_a_mixture_file_keep_their_backslashes(tmp_path):
    (tmp_path / "mix.txt").write_text('C:\\data\\new.json 2\n"D:\\my rows\\b.jsonl"#5\nmy\\ rows.json\n')
    assert read_data_path(str(tmp_path / "mix.txt")) == [
        MixtureSource(Path("C:\\data\\new.json"), count=2000),
        MixtureSource(Path("D:\\my rows\\b.jsonl"), count=5),
        MixtureSource(Path("my rows.json")),
    ]


def test_a_folder_named_like_a_mixture_file_is_called_a_folder(tmp_path):
    (tmp_path / "mix.txt").mkdir()
    with pytest.raises(DataError, match="found a folder, expected a mixture file"):
        read_data_path(str(tmp_path / "mix.txt"))


MIXTURE = """# what to learn
cats.json 1.5        # a comment

'my dogs.jsonl' 0.002
birds.parquet#300
fish.json:0.5
rest.json
"""


def test_mixture_files(tmp_path):
    (tmp_path / "cats.json").write_text("[]")
    (tmp_path / "mix.txt").write_text(MIXTURE)
    assert read_data_path(str(tmp_path / "mix.txt")) == [
        MixtureSource(tmp_path / "cats.json", count=1500),
        MixtureSource(Path("my dogs.jsonl"), count=2),
        MixtureSource(Path("birds.parquet"), count=300),
        MixtureSource(Path("fish.json"), weight=0.5),
        MixtureSource(Path("rest.json")),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a b 3", "line 1: found 3 words in 'a b 3', expected a path and thousands"),
        ("a x", "line 1: found 'x', expected thousands of samples per epoch, at least 0.001"),
        ("a -1", "line 1: found '-1'"),
        ("a inf", "line 1: found 'inf'"),
        ("a nan", "line 1: found 'nan'"),
        ("'a 3", "line 1: No closing quotation"),
        ("# nothing", "found no source"),
        ("a.json#0", "the amount 0, expected more than 0"),
    ],
)
def test_mixture_files_that_cannot_be_read(line, message, tmp_path):
    (tmp_path / "mix.txt").write_text(line)
    with pytest.raises(DataError, match=message):
        read_data_path(str(tmp_path / "mix.txt"))


def test_a_missing_or_garbled_mixture_file(tmp_path):
    with pytest.raises(DataError, match="no such file, expected a mixture file"):
        read_data_path(str(tmp_path / "mix.txt"))
    (tmp_path / "mix.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8 text"):
        read_data_path(str(tmp_path / "mix.txt"))


def test_a_data_set_of_several_files_numbers_rows_through_and_names_their_source(tmp_path):
    write_rows(tmp_path, [{"id": f"a{n}", "conversations": chat("q", f"a{n}")} for n in range(3)], "a.json")
    write_rows(tmp_path, [{"id": f"b{n}", "conversations": chat("q", f"b{n}")} for n in range(2)], "b.json")
    (tmp_path / "mix.txt").write_text("a.json#4\nb.json:0.5\n")
    rows = SupervisedDataset(tmp_path / "mix.txt", processing("v2_6"))
    assert (len(rows), rows.mixture.row_count) == (5, 5)
    assert [rows[index]["origin"] for index in range(5)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert rows.mixture.names == [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert len(rows.mixture.epoch_order(seed=0, epoch=0)) == 5
    assert Counter(row >= 3 for row in rows.mixture.epoch_order(seed=0, epoch=0)) == {False: 4, True: 1}


def test_the_first_rows_of_each_file_are_all_that_is_taken(tmp_path):
    for name, count in (("a.json", 5), ("b.json", 2)):
        rows = [{"id": f"{name}{n}", "conversations": chat("q", f"{name} {n}")} for n in range(count)]
        write_rows(tmp_path, rows, name)
    names = f"{tmp_path}/a.json#4,{tmp_path}/b.json"
    rows = SupervisedDataset(names, processing("v2_6"), max_samples=3)
    assert (len(rows), rows.mixture.row_count) == (3 + 2, 3 + 2)
    assert rows.mixture.read(2)["id"] == "a.json2"
    assert rows.mixture.read(3)["id"] == "b.json0"


def test_no_rows_at_all_are_refused():
    with pytest.raises(DataError, match="--max_samples: found 0, expected at least 1"):
        DataArguments(max_samples=0)


def test_a_part_keeps_the_numbers_of_its_rows_and_the_amounts_of_its_files(tmp_path):
    write_rows(tmp_path, [{"conversations": chat("q", f"a{n}")} for n in range(5)], "a.json")
    write_rows(tmp_path, [{"conversations": chat("q", f"b{n}")} for n in range(4)], "b.json")
    whole = SupervisedDataset(f"{tmp_path}/a.json:2,{tmp_path}/b.json#3", processing("v2_6")).mixture
    chosen = np.array([True, False, True, True, False, False, True, True, False])
    part, once = whole.part(chosen), whole.part(~chosen, once=True)
    drawn = Counter(part.epoch_order(seed=1, epoch=0))
    assert {row: drawn[row] for row in (0, 2, 3)} == {0: 2, 2: 2, 3: 2}
    assert sorted(drawn[row] for row in (6, 7)) == [1, 2]
    assert set(drawn) == {0, 2, 3, 6, 7}
    assert once.epoch_order(seed=1, epoch=0, shuffle=False) == [1, 4, 5, 8] == once.numbers.tolist()
    assert part.origin(6) == (1, 1)
    with pytest.raises(DataError, match="all of its 4 rows are held out, expected at least one"):
        whole.part(np.arange(9) < 5)


def test_a_share_without_rows_is_refused(tmp_path):
    path = write_rows(tmp_path, [{"conversations": chat("q", "a")}])
    with pytest.raises(DataError, match="its share of 1 rows is none"):
        SupervisedDataset(f"{path}:0.2", processing("v2_6"))
