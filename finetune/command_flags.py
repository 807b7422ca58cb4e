"""Flags that chat.py, predict.py and merge_lora.py share. Imports no torch, so that ``--help`` is quick."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from typing import Any, NoReturn

DTYPES = ("auto", "bf16", "fp16", "fp32")


class CommandParser(argparse.ArgumentParser):
    """Takes full names only, and ends with one message and exit code 1 on a mistake."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, without the list of all flags."""
        sys.stderr.write(f"\nerror: {message}. {self.prog} --help lists every flag.\n")
        raise SystemExit(1)


def run_command(run: Callable[[Any], None], values: argparse.Namespace, *, interrupted: str) -> int:
    """Run a command; give its exit code: 0, 1 after a message for a user's mistake, 130 after Ctrl-C.

    Args:
        run: Does the work.
        values: Its flags.
        interrupted: What is said after Ctrl-C.
    """
    # It says on every CPU, when peft imports it, that a faster kernel could be downloaded (0.50).
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from run_control import RunControl

    control = RunControl()
    with control.user_errors_as_messages():
        try:
            run(values)
        except KeyboardInterrupt:
            control.exit_code = 130  # 128 + SIGINT, as shells count
            sys.stderr.write(f"\n{interrupted}\n")
    return control.end()


def switch(text: str) -> bool:
    """true or false, as the other scripts take it.

    Example:
        >>> switch("True"), switch("0")
        (True, False)
    """
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"found {text!r}, expected true or false")


def add_switch(parser: argparse._ActionsContainer, name: str, *, default: bool, help: str) -> None:
    """Add a flag that is set by its name alone, or by ``true`` or ``false`` behind it."""
    parser.add_argument(name, type=switch, nargs="?", const=True, default=default, help=help)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Which model is asked, and how it is held."""
    group = parser.add_argument_group("Model")
    group.add_argument(
        "--model_name_or_path",
        help="The model: a checkpoint's folder or a hub id. May be left out with --adapter, which names "
        "its base.",
    )
    group.add_argument("--adapter", help="Folder of a LoRA adapter, also of the early official scripts.")
    group.add_argument(
        "--dtype", default="auto", choices=DTYPES,
        help="Precision of the weights. auto: on a GPU 16 bit, if stored so; on a CPU fp32 for small models.",
    )  # fmt: skip
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
    add_switch(group, "--load_4bit", default=False, help="Hold the language model in 4 bit (bitsandbytes).")
    group.add_argument(
        "--attn_implementation", default="sdpa", choices=["sdpa", "eager", "flash_attention_2"],
        help="How the language model computes attention.",
    )  # fmt: skip
    group.add_argument("--cache_dir", help="Where checkpoints from the hub are kept.")
    group.add_argument(
        "--max_slice_nums", type=int, help="Most slices an image is cut into. Unset: the checkpoint's."
    )
    add_switch(
        group, "--allow_other_base", default=False, help="Use an adapter on a model it was not trained on."
    )


def add_generation_flags(parser: argparse.ArgumentParser, *, sampling: bool, max_new_tokens: int) -> None:
    """How answers are generated.

    Args:
        parser: Gets the flags.
        sampling: The default of ``--sampling``.
        max_new_tokens: The default of ``--max_new_tokens``.
    """
    group = parser.add_argument_group("Answers")
    group.add_argument(
        "--max_new_tokens", type=int, default=max_new_tokens, help="Longest answer, in tokens."
    )
    add_switch(
        group, "--sampling", default=sampling,
        help="Sample each token (true), or take the most likely one, or the best of --num_beams (false).",
    )  # fmt: skip
    for name, kind, text in (
        ("temperature", float, "0.7 when sampling"),
        ("top_p", float, "0.8 when sampling"),
        ("top_k", int, "100 when sampling"),
        ("repetition_penalty", float, "1.05 when sampling, else 1"),
        ("num_beams", int, "1"),
    ):
        group.add_argument(f"--{name}", type=kind, help=f"Unset: {text}.")
    group.add_argument("--seed", type=int, default=0, help="Seed of the sampling.")
    add_switch(group, "--enable_thinking", default=False, help="Let the model think first (V-4.5 and later).")
    group.add_argument("--system_prompt", default="", help="A system message in front of every conversation.")


def generation_options(values: argparse.Namespace) -> dict[str, Any]:
    """The flags as transformers' generation options; the released chat's values where unset."""
    from decoding import GREEDY, RELEASED_SAMPLING

    options = dict(RELEASED_SAMPLING if values.sampling else GREEDY)
    for name in ("temperature", "top_p", "top_k", "repetition_penalty", "num_beams"):
        if getattr(values, name) is not None:
            options[name] = getattr(values, name)
    return options | {"max_new_tokens": values.max_new_tokens}
