"""The pages of the documentation, and the commands and examples in them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from support.paths import ROOT

PAGES = sorted(
    [
        ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "finetune" / "readme.md",
        *(ROOT / "docs").glob("*.md"),
    ]
)  # fmt: skip
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    """A page's name, for a test's id."""
    return str(page.relative_to(ROOT))


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def fenced(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return [body for found, body in _FENCE.findall(read(page)) if found == language]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", read(page))


def indented(page: Path) -> list[str]:
    """The indented blocks, which hold commands."""
    lines = [line[4:] if line.startswith("    ") else "" for line in _without_lists(prose(page))]
    return [block for block in re.split(r"\n\n+", "\n".join(lines).strip("\n")) if block]


def _without_lists(text: str) -> list[str]:
    """The lines of a text; the further lines of a list's item are no block."""
    lines, in_list = [], False
    for line in text.splitlines():
        in_list = bool(re.match(r"(-|\d+\.) ", line)) or (in_list and line.startswith(" "))
        lines.append("" if in_list else line)
    return lines


@dataclass(frozen=True)
class Command:
    """A command of a page.

    Attributes:
        page: The page's name.
        line: The command as it stands there, its lines joined.
        variables: What it sets in the environment.
        words: The program and its arguments.
    """

    page: str
    line: str
    variables: dict[str, str]
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {self.line}"


def commands(page: Path) -> list[Command]:
    """Every command of a page, comments left out: those in indented blocks, and those within a sentence."""
    joined = "\n".join(indented(page)).replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if line and not line.startswith("#")]
    lines += re.findall(r"`((?:python|bash) [^`]+)`", prose(page).replace("\n", " "))
    return [_command(name_of(page), line) for line in lines]


def _command(page: str, line: str) -> Command:
    words = shlex.split(line, comments=True)
    variables = {}
    while words and re.match(r"[A-Za-z_]\w*=", words[0]):
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    return Command(page, line, variables, tuple(words))
