"""benchmarks/beside_peers.py: the same rows for everyone, and peers that are not there are left out with the reason."""

import argparse
import json
import sys
from pathlib import Path

import pytest

import beside_peers
from support import processes
from support.paths import BENCHMARKS


def test_all_programs_get_the_same_rows(tmp_path):
    official, swift = beside_peers.draw_rows(tmp_path, 5)
    rows = json.loads(official.read_text())
    others = [json.loads(line) for line in swift.read_text().splitlines()]
    assert [row["conversations"] for row in rows] == [row["messages"] for row in others]
    assert [[row["image"]] for row in rows] == [row["images"] for row in others]
    assert all(Path(row["image"]).is_file() for row in rows)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"log_history": [{"train_runtime": 12.5}]}', 12.5),
        ("{'train_runtime': '144', 'train_loss': 6}", 144.0),
        ('{"train_runtime": 1.0}\n{"train_runtime": 2.0}', 2.0),
        ('{"loss": 1}', None),
    ],
)
def test_the_seconds_are_those_that_the_trainer_reports(text, expected):
    assert beside_peers.runtime_in(text) == expected


def test_ratios_are_to_the_best_of_the_peers():
    times = {"ours, plain": [2.0, 4.0, 3.0], "ms-swift, plain": [6.0], "ms-swift, grouped": [4.5]}
    lines = beside_peers.table(times).splitlines()
    assert [line.split()[-1] for line in lines] == ["1.50", "0.75", "1.00"]
    assert beside_peers.table({"ours, plain": [1.0]}).endswith("(1.0 to 1.0)")


def test_a_peer_that_is_not_there_is_left_out_with_the_reason(tmp_path):
    nobody = argparse.Namespace(
        swift=None, official=None, official_code=None, official_python="python", only=[]
    )
    found = beside_peers.programs(nobody, "v4_6", tmp_path / "model", tmp_path)
    assert found["ms-swift, plain"] == "--swift names no interpreter with ms-swift"
    assert found["official script"] == "there is none for this model"
    found = beside_peers.programs(nobody, "v2_6", tmp_path / "model", tmp_path)
    assert found["official script"] == "--official and --official_code are not given"
    assert isinstance(found["ours, packed"], list)


@pytest.mark.slow
def test_our_own_runs_are_measured(tmp_path):
    script = BENCHMARKS / "beside_peers.py"
    words = [
        "--generations",
        "v4_6",
        "--rows",
        "16",
        "--repeats",
        "1",
        "--size",
        "tiny",
        "--swift",
        "/no/python",
    ]
    done = processes.run([sys.executable, script, *words, "--only", "packed", "ms-swift, plain"], limit=400)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "v4_6 ms-swift, plain: left out" in done.stdout
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("ours, packed"))
    assert float(line.split()[2]) > 0
