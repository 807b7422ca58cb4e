"""``finetune.py``'s command line: read and checked without torch, and written for what follows a run."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import shutil
import sys
import textwrap
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

from minicpm_tune import __version__
from minicpm_tune.errors import UserError
from minicpm_tune.processes import local_rank
from minicpm_tune.settings.argument_groups import LoraArguments, ModelArguments, RunOptions, TuningOptions
from minicpm_tune.settings.checks import UsageError, check_arguments, raise_problems
from minicpm_tune.settings.command_flags import add_fields, flag_reader, nearest
from minicpm_tune.settings.data_arguments import DataArguments, RowLimits
from minicpm_tune.settings.legacy_flags import DROPPED, FOREIGN, RENAMED, REWRITTEN, translate
from minicpm_tune.settings.trainer_arguments import TRAINER_ARGUMENTS

logger = logging.getLogger(__name__)

OWN_GROUPS = (ModelArguments, DataArguments, TuningOptions, LoraArguments, RunOptions)
_OWN = {item.name for group in OWN_GROUPS for item in fields(group)}
_HIDDEN = ("local_rank", "gradient_checkpointing", "gradient_checkpointing_kwargs")
# Torchrun ends all processes soon after the first has failed; the message of one is enough.
_LATER = 3.0  # seconds
_USAGE = """usage: finetune_lora.sh | finetune_ds.sh [arguments]
       torchrun [--nproc_per_node N] finetune.py --model_name_or_path MODEL --data_path ROWS [arguments]

Fine-tune a MiniCPM-V or InternLM-XComposer2 model. The launchers set sensible values and use every GPU.
A switch takes true or false; alone it means true.
"""
_MORE = (
    "--help-all also lists the arguments of transformers' Trainer. Each acts, or is refused with a reason.\n"
)
# The launchers' variables. A launcher exports LAUNCHER, its path, and LAUNCHER_FLAGS, how many of finetune.py's words
# came from the user; what the user set in the environment is still there.
VARIABLES = (
    "MODEL", "DATA", "EVAL_DATA", "LLM_TYPE", "MODEL_MAX_Length", "IMG_SIZE", "HD_NUM", "OUTPUT_DIR", "MAX_STEPS",
    "EPOCHS", "LEARNING_RATE", "SAVE_STEPS", "EVAL_STEPS", "PRECISION", "DEEPSPEED", "FSDP", "GPUS_PER_NODE", "NNODES",
    "NODE_RANK", "MAX_RESTARTS", "RDZV", "RDZV_ID", "RDZV_CONF", "LOCAL_ADDR",
)  # fmt: skip

Group = TypeVar("Group")


@dataclass(frozen=True)
class CommandLine:
    """What a command line says, checked.

    Attributes:
        model: Its model arguments.
        data: Its data arguments.
        lora: Its adapter arguments.
        training: A value for every field of ``settings.arguments.TrainingArguments``.
        notes: A sentence for every old flag.
        environment: Variables that take the place of old flags.
    """

    model: ModelArguments
    data: DataArguments
    lora: LoraArguments
    training: Namespace
    notes: list[str]
    environment: dict[str, str]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message.removeprefix('argument ')}. finetune.py --help lists the arguments.")


def read_command_line(argv: list[str]) -> CommandLine:
    """Read and check a command line, as far as that needs neither the model nor the hardware.

    Args:
        argv: The words after the script's name; flags of the official guides included.

    Raises:
        UsageError: With every problem found.
    """
    translation = translate(argv)
    parser = _parser()
    raise_problems(_unknown_flags(translation.argv, parser))
    values = parser.parse_args(translation.argv)
    model = _pick(ModelArguments, values)
    data = _pick(DataArguments, values)
    lora = _pick(LoraArguments, values)
    own = (item.name for group in (TuningOptions, RunOptions) for item in fields(group))
    training = Namespace(**{name: getattr(values, name) for name in (*own, *TRAINER_ARGUMENTS)})
    if isinstance(training.report_to, list):
        training.report_to = [name for text in training.report_to for name in text.split(",") if name]
    if training.optim_target_modules == ["all-linear"]:
        training.optim_target_modules = "all-linear"  # transformers takes a list's items for parts of names
    check_arguments(model, data, training, lora)
    return CommandLine(model, data, lora, training, translation.notes, translation.environment)


def _unknown_flags(argv: list[str], parser: _Parser) -> Iterator[str]:
    known = parser._option_string_actions
    for flag in dict.fromkeys(word.partition("=")[0] for word in argv if word.startswith("--")):
        if flag in known:
            continue
        if flag[2:] in FOREIGN:
            yield f"unknown argument {flag}. Here it is {FOREIGN[flag[2:]]}."
        elif near := nearest(flag, known):
            yield f"unknown argument {flag}. Did you mean {near}?"
        else:
            yield f"unknown argument {flag}. finetune.py --help-all lists every argument."


def _pick(group: type[Group], values: Namespace) -> Group:
    """Make a group of its values among all."""
    return group(**{name: getattr(values, name) for name in get_type_hints(group)})


def answer_or_check(argv: list[str]) -> None:
    """Answer ``--help``, ``--help-all`` and ``--version``, and refuse a wrong command line.

    Call before torch is imported: all of this takes a fraction of a second.

    Raises:
        SystemExit: With 0 after an answer, with 1 after a message about a mistake.
    """
    width = shutil.get_terminal_size((100, 24)).columns
    if "--version" in argv:
        _leave(f"minicpm_tune {__version__}\n")
    if "--help-all" in argv:
        _leave(render_help(width, everything=True))
    if "--help" in argv or "-h" in argv:
        _leave(render_help(width))
    try:
        read_command_line(argv)
    except UserError as error:
        if local_rank():
            time.sleep(_LATER)
        sys.stderr.write(f"\nerror: {error}\n")
        raise SystemExit(1) from None


def _leave(text: str) -> NoReturn:
    sys.stdout.write(text)
    raise SystemExit(0)


def flag_names() -> set[str]:
    """Every flag that ``finetune.py`` takes, old names included."""
    return {f"--{name}" for name in (*_OWN, *TRAINER_ARGUMENTS, *RENAMED, *DROPPED, *REWRITTEN)}


def _parser() -> _Parser:
    # resolve: two groups share the limits of a row, and one flag fills both.
    parser = _Parser(prog="finetune.py", add_help=False, allow_abbrev=False, conflict_handler="resolve")
    for group in OWN_GROUPS:
        add_fields(parser, group)
    for name, argument in TRAINER_ARGUMENTS.items():
        if name not in _OWN:
            how = flag_reader(argument.kind, optional=argument.optional)
            parser.add_argument(f"--{name}", default=argument.default, **how)
            if argument.kind is bool and argument.default is True:
                parser.add_argument(f"--no_{name}", dest=name, action="store_false")
    return parser


def render_help(width: int = 100, *, everything: bool = False) -> str:
    """The help page.

    Args:
        width: Of the screen, in characters.
        everything: Whether the arguments of transformers' Trainer are listed too; their texts are read from
            transformers, which takes seconds.
    """
    pages = [_USAGE]
    limits = {item.name for item in fields(RowLimits)}  # told with the data alone
    for group in OWN_GROUPS:
        items = [item for item in fields(group) if group is DataArguments or item.name not in limits]
        pages.append(_page(group._argument_group_name, items, width))
    if everything:
        from transformers import TrainingArguments  # takes seconds, and only --help-all asks

        inherited = [item for item in fields(TrainingArguments) if item.name not in {*_OWN, *_HIDDEN}]
        pages.append(_page("transformers' Trainer", inherited, width))
    else:
        pages.append(_MORE)
    pages.append(_old_names(width))
    return "\n".join(pages)


def _page(title: str, items: Any, width: int) -> str:
    lines = [f"{title}:"]
    for item in items:
        lines.append(f"  --{item.name}")
        lines += textwrap.wrap(_text(item), width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines) + "\n"


def _text(item: Field) -> str:
    text = " ".join(str(item.metadata["help"]).replace("%%", "%").split())
    argument = TRAINER_ARGUMENTS.get(item.name)
    if argument is not None and argument.refusal:
        return f"Not supported: {argument.refusal}."
    if choices := item.metadata.get("choices"):
        text += f" One of: {', '.join(map(str, choices))}."
    if item.default not in (None, "", MISSING):
        shown = str(item.default).lower() if isinstance(item.default, bool) else item.default
        text += f" (default: {shown})"
    return text


def _old_names(width: int) -> str:
    renamed = [f"--{old} (now --{new})" for old, new in RENAMED.items()]
    others = [f"--{name}" for name in REWRITTEN if name not in TRAINER_ARGUMENTS]
    dropped = [f"--{name}" for name in DROPPED]
    text = f"{', '.join(renamed + others)}. Without effect: {', '.join(dropped)}."
    lines = textwrap.wrap(text, width - 6, break_on_hyphens=False)
    return "Old names that still work:\n" + textwrap.indent("\n".join(lines), " " * 6) + "\n"


def log_how_to_continue(argv: list[str], *, step: int, steps: int) -> None:
    """After a signal, log what was saved and the command that continues from it."""
    logger.info(
        f"Stopped after step {step} of {steps}; checkpoint-{step} holds everything. To continue, in {os.getcwd()}:"
        f"\n\n    {command_to_continue(argv, script=sys.argv[0])}\n"
    )


def log_what_comes_next(output_dir: str, *, adapter: bool) -> None:
    """After a finished run, log where the result is and the commands that use it."""
    commands = commands_after(output_dir, adapter=adapter, script=sys.argv[0])
    listed = "".join(f"    {command}\n" for command in commands)
    logger.info(f"Finished: the {'adapter' if adapter else 'model'} is in {output_dir}. Next:\n\n{listed}")


def command_to_continue(argv: list[str], *, script: str) -> str:
    """The command line that goes on where this run stopped, from the folder it was started in.

    Args:
        argv: The words after the script's name.
        script: The script's name, as it was started.

    Example:
        >>> words = ["--data_path", "my rows.json", "--overwrite_output_dir", "true"]
        >>> command_to_continue(words, script="finetune.py").partition(" ")[2]
        "finetune.py --data_path 'my rows.json' --resume_from_checkpoint true"
    """
    environment = os.environ
    continues = ["--resume_from_checkpoint", "true"]
    if "LAUNCHER" not in environment:
        return shlex.join([*_start(), script, *_kept(argv), *continues])
    several = environment.get("NNODES", "1") != "1"  # torchrun sets these two for one machine as well
    names = (*VARIABLES, "MASTER_ADDR", "MASTER_PORT") if several else VARIABLES
    values = [f"{name}={shlex.quote(environment[name])}" for name in names if name in environment]
    if environment.get("MAX_RESTARTS"):
        argv = argv[:-2]  # the launcher's own --resume_from_checkpoint true
    flags = argv[len(argv) - int(environment["LAUNCHER_FLAGS"]) :]
    words = ["bash", _shown(Path(environment["LAUNCHER"])), *_kept(flags), *continues]
    return " ".join([*values, shlex.join(words)])


def commands_after(output_dir: str, *, adapter: bool, script: str) -> list[str]:
    """What can be done with a model or adapter, as command lines.

    Args:
        output_dir: Where it was saved.
        adapter: Whether it is one.
        script: finetune.py's name, as it was started; the other commands stand beside it.

    Example:
        >>> for command in commands_after("output/lora", adapter=True, script="finetune/finetune.py"):
        ...     print(command)
        python finetune/merge_lora.py --adapter output/lora --output_dir output/merged
        python finetune/chat.py --adapter output/lora --image PICTURE --question "What is this?"
        python finetune/predict.py --adapter output/lora --data_path ROWS --output predictions.jsonl
    """
    folder = shlex.quote(output_dir)
    merged = shlex.quote(str(Path(output_dir).with_name("merged")))
    which = f"--adapter {folder}" if adapter else f"--model_name_or_path {folder}"
    call = {
        name: f"python {shlex.quote(_shown(Path(script).absolute().with_name(name)))}"
        for name in ("merge_lora.py", "chat.py", "predict.py")
    }
    commands = [f"{call['merge_lora.py']} --adapter {folder} --output_dir {merged}"] if adapter else []
    commands.append(f'{call["chat.py"]} {which} --image PICTURE --question "What is this?"')
    commands.append(f"{call['predict.py']} {which} --data_path ROWS --output predictions.jsonl")
    return commands


def _shown(path: Path) -> str:
    """A path as it can be typed here: relative to the current folder where it lies in it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _start() -> list[str]:
    """How the processes of this run were started, without a launcher."""
    here, everywhere = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("WORLD_SIZE")
    if here is None or "TORCHELASTIC_RUN_ID" not in os.environ:
        return [os.path.basename(sys.executable)]
    start = ["torchrun", "--nproc_per_node", here]
    if everywhere != here:
        start += ["--nnodes", os.environ["GROUP_WORLD_SIZE"], "--node_rank", os.environ["GROUP_RANK"]]
        start += ["--master_addr", os.environ["MASTER_ADDR"], "--master_port", os.environ["MASTER_PORT"]]
    return start


def _kept(argv: list[str]) -> list[str]:
    """The words without the flags that the next run decides, and their values."""
    kept: list[str] = []
    dropping = False
    for word in argv:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            dropping = name in ("resume_from_checkpoint", "overwrite_output_dir")
        if not dropping:
            kept.append(word)
    return kept


if __name__ == "__main__":
    answer_or_check(sys.argv[1:])
