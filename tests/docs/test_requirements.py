"""The requirement files: complete, pinned, explained."""

import ast
import json
import re
import sys

from support.paths import FINETUNE, ROOT


def test_requirements_cover_every_import_of_the_product():
    names = re.findall(r"^([\w-]+)==", (FINETUNE / "requirements.txt").read_text(), flags=re.MULTILINE)
    pinned = {name.replace("-", "_").lower() for name in names}
    optional = {"flash_attn", "liger_kernel", "av", "soxr", "triton", "modelscope"}
    package_of = {"PIL": "pillow"}
    folders = [FINETUNE, ROOT / "demo"]
    files = [path for folder in folders for path in folder.rglob("*.py")]
    own = {"minicpm_tune", *(path.stem for path in files)}
    for path in files:
        for name in imported_packages(path) - own - set(sys.stdlib_module_names) - optional:
            assert package_of.get(name, name).lower() in pinned, f"{path.name} imports {name}"


def imported_packages(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.partition(".")[0])
    return names


def test_every_requirement_is_pinned_and_explained():
    for file in (FINETUNE / "requirements.txt", ROOT / "tests" / "requirements.txt"):
        for line in file.read_text().splitlines():
            assert line.startswith("#") or re.fullmatch(r"[\w-]+==[\w.]+ +# .+", line), line
    assert (ROOT / "requirements.txt").read_text() == "-r finetune/requirements.txt\n"


def test_the_json_files_are_json():
    files = list(FINETUNE.glob("*.json"))
    assert len(files) == 4
    for file in files:
        json.loads(file.read_text())
