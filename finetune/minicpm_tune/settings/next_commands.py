"""The commands that come after a run: to continue one that was stopped, and to use what a finished one has written."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from pathlib import Path

logger = logging.getLogger(__name__)

# The launchers' variables. A launcher exports LAUNCHER, its path, and LAUNCHER_FLAGS, how many of finetune.py's words
# came from the user; what the user set in the environment is still there.
VARIABLES = (
    "MODEL", "DATA", "EVAL_DATA", "LLM_TYPE", "MODEL_MAX_Length", "IMG_SIZE", "HD_NUM", "OUTPUT_DIR", "MAX_STEPS",
    "EPOCHS", "LEARNING_RATE", "SAVE_STEPS", "EVAL_STEPS", "PRECISION", "DEEPSPEED", "FSDP", "GPUS_PER_NODE", "NNODES",
    "NODE_RANK", "MAX_RESTARTS", "RDZV", "RDZV_ID", "RDZV_CONF", "LOCAL_ADDR",
)  # fmt: skip
_OF_SEVERAL_MACHINES = ("MASTER_ADDR", "MASTER_PORT")  # torchrun sets them too
_NEXT_RUN_DECIDES = ("resume_from_checkpoint", "overwrite_output_dir")


def log_how_to_continue(argv: list[str], *, step: int, steps: int) -> None:
    """After a signal, log what was saved and the command that continues from it."""
    logger.info(
        "Stopped after step %d of %d; checkpoint-%d holds everything. To continue, in %s:\n\n    %s\n",
        step, steps, step, os.getcwd(), command_to_continue(argv, script=sys.argv[0]),
    )  # fmt: skip


def log_what_comes_next(output_dir: str, *, adapter: bool) -> None:
    """After a finished run, log where the result is and the commands that use it."""
    commands = "".join(
        f"    {text}\n" for text in commands_after(output_dir, adapter=adapter, script=sys.argv[0])
    )
    logger.info(
        "Finished: the %s is in %s. Next:\n\n%s", "adapter" if adapter else "model", output_dir, commands
    )


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
        return shlex.join([*_start(), script, *_without(argv, _NEXT_RUN_DECIDES), *continues])
    several = environment.get("NNODES", "1") != "1"
    names = [*VARIABLES, *(_OF_SEVERAL_MACHINES if several else ())]
    values = [f"{name}={shlex.quote(environment[name])}" for name in names if name in environment]
    if environment.get("MAX_RESTARTS"):
        argv = argv[:-2]  # the launcher's own --resume_from_checkpoint true
    flags = argv[len(argv) - int(environment["LAUNCHER_FLAGS"]) :]
    words = ["bash", _shown(Path(environment["LAUNCHER"])), *_without(flags, _NEXT_RUN_DECIDES), *continues]
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


def _without(argv: list[str], names: tuple[str, ...]) -> list[str]:
    """Leave flags out, with their values."""
    kept: list[str] = []
    dropping = False
    for word in argv:
        if word.startswith("--"):
            dropping = word[2:].partition("=")[0].replace("-", "_") in names
        if not dropping:
            kept.append(word)
    return kept
