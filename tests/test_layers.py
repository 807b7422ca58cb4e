"""The house's rules: a room imports only from rooms below it, and no folder grows past what a reader can hold."""

import sys
from collections import Counter

from support import processes
from support.paths import FINETUNE, ROOT

MOST_MODULES = 16  # in one folder


def test_a_room_imports_only_from_rooms_below_it():
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    environment = {"PYTHONPATH": str(FINETUNE), "PATH": ""}
    done = processes.run([sys.executable, "-c", code], cwd=ROOT, env=environment, limit=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_folder_holds_more_modules_than_a_reader_can():
    package = FINETUNE / "minicpm_tune"
    counts = Counter(path.parent for path in package.rglob("*.py") if path.name != "__init__.py")
    assert {str(folder): count for folder, count in counts.items() if count > MOST_MODULES} == {}
