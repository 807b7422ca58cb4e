"""docs/architecture.md: the rooms are those that exist, and the path of one row is the one that the code takes."""

import re
import sys
from pathlib import Path

import pytest

import finetune
from dataset import SupervisedDataset
from make_checkpoint import make_checkpoint
from support.finetune_runs import write_data
from support.pages import read
from support.paths import FINETUNE, ROOT

PAGE = ROOT / "docs" / "architecture.md"
PACKAGE = FINETUNE / "minicpm_tune"
LONGEST_PATH = 14  # files


def rooms():
    section = read(PAGE).partition("## Rooms")[2].partition("\n## ")[0]
    return [
        name
        for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
        for name in re.findall(r"`(.*?)`", row)
    ]


def path_of_one_row():
    section = read(PAGE).partition("## The path of one row")[2].partition("\n## ")[0]
    return [ROOT / name for name in re.findall(r"^\d+\. `(.*?)`", section, re.MULTILINE)]


def test_the_rooms_are_those_that_exist():
    folders = {f"{path.parent.relative_to(PACKAGE)}/" for path in PACKAGE.rglob("__init__.py")} - {"./"}
    modules = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}
    assert sorted(rooms()) == sorted(folders | modules)


@pytest.fixture
def files(monkeypatch):
    """The files of the product that the first row of training goes through, in the order in which it enters them."""
    found = []

    def note(frame, event, argument):
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(str(FINETUNE)) and file not in found:
            found.append(file)

    read_row = SupervisedDataset.__getitem__

    def start(self, index):
        sys.setprofile(note)
        return read_row(self, index)

    monkeypatch.setattr(SupervisedDataset, "__getitem__", start)
    before = sys.getprofile()
    yield found
    sys.setprofile(before)


def test_a_row_takes_the_path_that_the_page_describes(tmp_path, files):
    steps = path_of_one_row()
    assert len(steps) <= LONGEST_PATH
    assert len(set(steps)) == len(steps)
    words = {
        "model_name_or_path": make_checkpoint(tmp_path / "model", "v2_6", size="tiny"),
        "data_path": write_data(tmp_path / "data", rows=2, text_only=()),
        "output_dir": tmp_path / "out", "max_steps": 1, "save_strategy": "no", "report_to": "none",
        "dataloader_num_workers": 0, "use_cpu": "true",
    }  # fmt: skip
    assert finetune.main([word for name, value in words.items() for word in (f"--{name}", str(value))]) == 0
    until_the_loss = files[: files.index(str(steps[-1])) + 1]
    taken = [Path(file) for file in until_the_loss if Path(file) in steps]
    assert steps[0] == FINETUNE / "finetune.py"
    assert [path.relative_to(ROOT) for path in taken] == [path.relative_to(ROOT) for path in steps[1:]]
