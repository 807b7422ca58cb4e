"""The house's rules: a room imports only from rooms below it, and no folder grows past what a reader can hold."""

import subprocess
import sys
from collections import Counter

from support.paths import FINETUNE, ROOT

MOST_MODULES = 16  # in one folder


def test_a_room_imports_only_from_rooms_below_it():
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
        cwd=ROOT, env={"PYTHONPATH": str(FINETUNE), "PATH": ""}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_folder_holds_more_modules_than_a_reader_can():
    package = FINETUNE / "minicpm_tune"
    counts = Counter(path.parent for path in package.rglob("*.py") if path.name != "__init__.py")
    assert {str(folder): count for folder, count in counts.items() if count > MOST_MODULES} == {}
