"""The house's rules: a room imports only from rooms below it, and no folder grows past what a reader can hold."""

import ast
import re
import sys
from collections import Counter

from support import processes
from support.paths import FINETUNE, ROOT, TESTS

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


def subjects(room):
    """What a room's test files may be named after: its modules, its folders, and the commands."""
    package = FINETUNE / "minicpm_tune" / room
    inside = {path.stem for path in package.rglob("*.py")} | {
        path.name for path in package.rglob("*") if path.is_dir()
    }
    return inside | {path.stem for path in FINETUNE.glob("*.py")}


def test_a_rooms_test_file_is_named_after_what_it_tests():
    """``test_packing.py`` is about ``packing.py``; ``test_packing_*.py`` are more of the same."""
    wrong = [
        str(path.relative_to(TESTS))
        for room in (FINETUNE / "minicpm_tune").iterdir()
        if room.is_dir()
        for path in (TESTS / room.name).glob("test_*.py")
        if not any(
            path.stem[5:] == name or path.stem[5:].startswith(f"{name}_") for name in subjects(room.name)
        )
    ]
    assert wrong == []


def test_no_test_imports_another_test_file():
    importing = re.compile(r"^(from|import) +[\w.]*\btest_\w+", re.MULTILINE)
    assert [str(path) for path in TESTS.rglob("*.py") if importing.search(path.read_text())] == []


def unexplained_imports(text):
    """The lines of imports in functions that neither a comment nor the message for a missing package explains."""
    tree, lines = ast.parse(text), text.splitlines()
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    optional = {each for block in ast.walk(tree) if isinstance(block, ast.Try) for each in block.body}
    group = set()  # lines of imports that follow one with a reason
    for node in sorted(
        {each for function in functions for each in ast.walk(function)} - optional,
        key=lambda each: getattr(each, "lineno", 0),
    ):
        if isinstance(node, ast.Import | ast.ImportFrom):
            first = node.lineno - 1
            if "#" in lines[first] or lines[first - 1].lstrip().startswith("#") or first in group:
                group.add(node.end_lineno)
            else:
                yield node.lineno


def test_an_import_inside_a_function_says_why():
    """A comment does, or the module's docstring."""
    silent = [
        f"{path.relative_to(FINETUNE)}:{number}"
        for path in FINETUNE.rglob("*.py")
        if not re.search(
            r"where (it is|they are) used|at its top", ast.get_docstring(ast.parse(path.read_text())) or ""
        )
        for number in unexplained_imports(path.read_text())
    ]
    assert silent == []
