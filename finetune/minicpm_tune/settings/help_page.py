"""``finetune.py --help``, shown without importing torch or transformers.

Our own arguments are read from their dataclasses; those inherited from transformers are read from the
source text of its ``TrainingArguments``, because importing it takes several seconds.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import re
import shutil
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicpm_tune.settings.argument_groups import (
    DataArguments,
    LoraArguments,
    ModelArguments,
    RunOptions,
    TuningOptions,
)
from minicpm_tune.settings.legacy_flags import DROPPED, RENAMED, REWRITTEN

_HIDDEN = {"local_rank", "gradient_checkpointing", "gradient_checkpointing_kwargs", "do_predict"}


@dataclass(frozen=True)
class Entry:
    """One argument as the page shows it."""

    name: str
    help: str
    default: Any
    choices: tuple[Any, ...] = ()


def show_help_when_asked(argv: list[str]) -> None:
    """Write the help page and exit when ``--help`` or ``-h`` is among the words.

    Raises:
        SystemExit: With status 0, after the page was written.
    """
    if "--help" in argv or "-h" in argv:
        sys.stdout.write(render_help(width=shutil.get_terminal_size((100, 24)).columns))
        raise SystemExit(0)


def render_help(width: int = 100) -> str:
    """The whole page, grouped: our four groups, transformers' groups, and the old names."""
    groups = [(group._argument_group_name, own_entries(group)) for group in _OWN_GROUPS]
    groups += [(f"Trainer: {title}", entries) for title, entries in inherited_groups()]
    pages = [_USAGE, *(_render_group(title, entries, width) for title, entries in groups), _old_names(width)]
    return "\n".join(pages)


def flag_names() -> set[str]:
    """Every flag that ``finetune.py`` takes, old names included."""
    entries = [entry for group in _OWN_GROUPS for entry in own_entries(group)]
    entries += [entry for _, inherited in inherited_groups() for entry in inherited]
    names = {entry.name for entry in entries} | _HIDDEN | {*RENAMED, *DROPPED, *REWRITTEN}
    return {f"--{name}" for name in names}


def own_entries(group: type) -> list[Entry]:
    """The arguments of one of our dataclasses."""
    return [
        Entry(item.name, item.metadata["help"], item.default, tuple(item.metadata.get("choices", ())))
        for item in dataclasses.fields(group)
    ]


def inherited_groups() -> list[tuple[str, list[Entry]]]:
    """The arguments of ``transformers.TrainingArguments``, under the headings of its source."""
    source = _training_arguments_file().read_text(encoding="utf-8")
    headings = {0: "General"} | {
        number: match[1]
        for number, line in enumerate(source.splitlines(), start=1)
        if (match := re.fullmatch(r"\s+# --- (.+) ---\s*", line))
    }
    own = {item.name for group in _OWN_GROUPS for item in dataclasses.fields(group)}
    groups: dict[str, list[Entry]] = {}
    for node in _fields_in(source):
        entry = _entry_of(node)
        if entry.name in own | _HIDDEN:
            continue
        title = headings[max(line for line in headings if line < node.lineno)]
        groups.setdefault(title, []).append(entry)
    return list(groups.items())


_OWN_GROUPS = (ModelArguments, DataArguments, TuningOptions, LoraArguments, RunOptions)
_USAGE = """usage: torchrun [--nproc_per_node N] finetune.py --model_name_or_path MODEL --data_path ROWS ...

Fine-tunes a MiniCPM-V model. finetune_lora.sh and finetune_ds.sh start it with sensible values.
A switch takes true or false, and is true when it stands alone.
"""


def _training_arguments_file() -> Path:
    found = importlib.util.find_spec("transformers")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("transformers is not installed: pip install -r finetune/requirements.txt")
    return Path(found.origin).parent / "training_args.py"


def _fields_in(source: str) -> list[ast.AnnAssign]:
    """The ``name: type = field(...)`` statements of the class."""
    module = ast.parse(source)
    body = next(n.body for n in module.body if isinstance(n, ast.ClassDef) and n.name == "TrainingArguments")
    return [
        node
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call) and node.value.keywords
    ]


def _entry_of(node: Any) -> Entry:
    keywords = {word.arg: word.value for word in node.value.keywords}
    metadata = keywords["metadata"]
    parts = {key.value: value for key, value in zip(metadata.keys, metadata.values, strict=True)}
    text = re.sub(r"\s+", " ", str(_constant(parts.get("help"))))
    return Entry(node.target.id, text, _constant(keywords.get("default")))


def _constant(node: ast.expr | None) -> Any:
    """The value of a literal; ``None`` for an expression that only running the module would settle."""
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None


def _render_group(title: str, entries: list[Entry], width: int) -> str:
    lines = [f"{title}:"]
    for entry in entries:
        text = entry.help.replace("%%", "%").strip()
        if entry.choices:
            text += f" One of: {', '.join(map(str, entry.choices))}."
        if entry.default not in (None, "", dataclasses.MISSING):
            shown = str(entry.default).lower() if isinstance(entry.default, bool) else entry.default
            text += f" (default: {shown})"
        lines.append(f"  --{entry.name}")
        lines += textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines) + "\n"


def _old_names(width: int) -> str:
    renamed = [f"--{old} (now --{new})" for old, new in RENAMED.items()]
    others = [f"--{name}" for name in REWRITTEN if name != "optim"]
    dropped = [f"--{name}" for name in DROPPED]
    text = f"{', '.join(renamed + others)}. Without effect: {', '.join(dropped)}."
    lines = textwrap.wrap(text, width - 6, break_on_hyphens=False)
    return "Old names that still work:\n" + textwrap.indent("\n".join(lines), " " * 6) + "\n"
