"""What the pages of the documentation promise of each other and of the files: links, names, flags, spelling."""

import re
import sys

import pytest

from minicpm_tune.settings.finetune_command import flag_names
from support import processes
from support.pages import PAGES, commands, name_of, prose, read
from support.paths import FINETUNE, ROOT

LONGEST_README = 220  # lines
COMMANDS = (
    "chat", "predict", "merge_lora", "quantize", "inspect_data", "plan_memory", "convert_data coco",
    "convert_data rows",
)  # fmt: skip
# Flags of other programs that pages name outside of commands.
OTHER_PROGRAMS = {
    "--all", "--generation", "--task", "--jinja", "--mmproj", "--chat-template-kwargs", "--minicpmv_version", "--base",
}  # fmt: skip
# Files of other programs.
OTHER_FILES = {"minicpmv-surgery.py", "minicpmv-convert-image-encoder-to-gguf.py", "convert_hf_to_gguf.py"}
SETTLES_A_RUN = {
    "MODEL", "DATA", "EVAL_DATA", "OUTPUT_DIR", "EPOCHS", "MAX_STEPS", "LEARNING_RATE", "SAVE_STEPS", "EVAL_STEPS",
    "PRECISION", "DEEPSPEED", "FSDP",
}  # fmt: skip
BRITISH = re.compile(
    r"\b\w*(colour|behaviour|neighbour|favour|\bgrey|centre|labelled|cancell?ing|modelling|misspelt|"
    r"recognis|normalis|optimis|quantis|initialis|organis|summaris|stabilis|serialis)\w*", re.IGNORECASE,
)  # fmt: skip

every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


def anchor(heading):
    """The name under which a heading can be linked to."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@every_page
def test_links_lead_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if path.startswith("http"):
            continue
        headings = re.findall(r"^#+ (.*)$", read(file), re.MULTILINE) if file.is_file() else []
        if not file.exists() or (heading and heading not in map(anchor, headings)):
            broken.append(target)
    assert broken == []


def test_every_page_is_reached_from_the_readme():
    linked = set(re.findall(r"\]\(([^)#\s]+)", read(ROOT / "README.md")))
    assert {name_of(page) for page in (ROOT / "docs").glob("*.md")} <= linked


def test_the_readme_stays_short():
    assert len(read(ROOT / "README.md").splitlines()) <= LONGEST_README


@pytest.fixture(scope="session")
def known_flags():
    """Every flag of finetune.py, of old guides, and of the commands."""
    flags = {"--help", "--help-all", "--version", *flag_names()}
    for command in COMMANDS:
        name, *form = command.split()
        done = processes.run([sys.executable, FINETUNE / f"{name}.py", *form, "--help"], limit=100)
        flags |= set(re.findall(r"--\w+", done.stdout))
    return flags


@every_page
def test_every_flag_that_is_named_exists(page, known_flags):
    text = re.sub(r"^    .*$", "", prose(page), flags=re.MULTILINE)  # commands have a test of their own
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
    assert named - known_flags - OTHER_PROGRAMS == set()


@pytest.mark.parametrize("page", [*PAGES, ROOT / "benchmarks" / "RESULTS.md"], ids=name_of)
def test_every_file_that_is_named_exists(page):
    missing = []
    for name in re.findall(
        r"`([\w./*-]+\.(?:py|sh)|(?:docs|tests|finetune|benchmarks|demo)/[\w./*-]*)`", prose(page)
    ):
        folders = (ROOT, FINETUNE, FINETUNE / "minicpm_tune", page.parent)
        if name not in OTHER_FILES and not any(
            True
            for folder in folders
            for _ in [*folder.glob(name), *folder.glob(f"**/{name}")]
            if ".venv" not in str(_)
        ):
            missing.append(name)
    assert missing == []


def test_spelling_is_american():
    sources = [file for name in ("finetune", "demo", "benchmarks") for file in (ROOT / name).rglob("*.py")]
    texts = [
        *PAGES,
        *(ROOT / "benchmarks").glob("*.md"),
        *ROOT.glob("*.sh"),
        *FINETUNE.glob("*.sh"),
        *sources,
    ]
    found = {name_of(file): {match.group() for match in BRITISH.finditer(read(file))} for file in texts}
    assert {name: words for name, words in found.items() if words} == {}


@every_page
def test_lines_can_be_read_in_a_terminal(page):
    limit = 120
    long = [
        line for line in read(page).splitlines() if len(line) > limit and not line.startswith(("|", "    "))
    ]
    assert long == []


def test_the_readme_names_every_variable_that_settles_a_run():
    said = set(re.findall(r"`(\w+)`", read(ROOT / "README.md")))
    assert SETTLES_A_RUN <= said


def test_there_are_commands_to_check():
    assert sum(len(commands(page)) for page in PAGES) > 30
