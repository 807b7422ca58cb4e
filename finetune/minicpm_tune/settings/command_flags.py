"""What the small commands share: their flags. Imports no torch, so that ``--help`` is quick."""

from __future__ import annotations

import argparse
import difflib
import math
import sys
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

DTYPES = ("auto", "bf16", "fp16", "fp32")


class CommandParser(argparse.ArgumentParser):
    """Takes full names only, and ends with one message and exit code 1 on a mistake."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        """Read the flags; of a misspelt one the nearest is named, before what is missing because of it."""
        self.refuse_unknown(sys.argv[1:] if args is None else args)
        return super().parse_args(args, namespace)

    def refuse_unknown(self, words: Sequence[str], also_known: Collection[str] = ()) -> None:
        """End with a message when a flag is neither this command's nor one of ``also_known``."""
        known = {*self._option_string_actions, *also_known}
        for word in words:
            flag = word.partition("=")[0]
            if flag.startswith("--") and flag not in known:
                near = difflib.get_close_matches(flag, sorted(known), n=1)
                self.error(f"unknown flag {flag}" + (f"; did you mean {near[0]}?" if near else ""))

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, without the list of all flags."""
        sys.stderr.write(f"\nerror: {message}. {self.prog} --help lists every flag.\n")
        raise SystemExit(1)


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


def count(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number from 1 on")
    return int(text)


def positive(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number above 0")
    return value


def share(text: str) -> float:
    """A number above 0, at most 1."""
    if positive(text) > 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number above 0, at most 1")
    return float(text)


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
        "--max_slice_nums", type=count, help="Most slices an image is cut into. Unset: the checkpoint's."
    )
    group.add_argument(
        "--video_fps", type=positive,
        help="Frames taken per second of video; a folder of frames counts as sampled so. Unset: the generation's.",
    )  # fmt: skip
    group.add_argument(
        "--max_num_frames", type=count, help="Most frames of a video. Unset: the generation's."
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
        "--max_new_tokens", type=count, default=max_new_tokens, help="Longest answer, in tokens."
    )
    add_switch(
        group, "--sampling", default=sampling,
        help="Sample each token (true), or take the most likely one, or the best of --num_beams (false).",
    )  # fmt: skip
    for name, kind, text in (
        ("temperature", positive, "0.7; only when sampling"),
        ("top_p", share, "0.8; only when sampling"),
        ("top_k", count, "100; only when sampling"),
        ("repetition_penalty", positive, "1.05 when sampling, else 1"),
        ("num_beams", count, "1"),
    ):
        group.add_argument(f"--{name}", type=kind, help=f"Unset: {text}.")
    group.add_argument("--seed", type=int, default=0, help="Seed of the sampling.")
    add_switch(group, "--enable_thinking", default=False, help="Let the model think first (V-4.5 and later).")
    group.add_argument("--system_prompt", default="", help="A system message in front of every conversation.")


def check_generation_flags(parser: argparse.ArgumentParser, values: argparse.Namespace) -> None:
    """End with a message when a flag is given that would have no effect."""
    given = [name for name in ("temperature", "top_p", "top_k") if getattr(values, name) is not None]
    if given and not values.sampling:
        parser.error(
            f"--{given[0]} is given, but --sampling is false: set it to true, or leave --{given[0]} out"
        )
