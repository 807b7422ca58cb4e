"""How flags are read, and those that the small commands share. Imports no torch, so that ``--help`` is quick."""

from __future__ import annotations

import argparse
import difflib
import math
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import MISSING, fields
from types import NoneType
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from minicpm_tune.settings.data_arguments import DataArguments

DTYPES = ("auto", "bf16", "fp16", "fp32")


class CommandParser(argparse.ArgumentParser):
    """Takes full names only, each flag once, and ends with one message and exit code 1 on a mistake."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        """Read the flags. A misspelled one is reported before what is missing because of it."""
        words = sys.argv[1:] if args is None else args
        self.refuse_unknown(words)
        self.refuse_repeated(words)
        return super().parse_args(args, namespace)

    def refuse_unknown(self, words: Sequence[str], also_known: Collection[str] = ()) -> None:
        """End with a message when a flag is neither this command's nor one of ``also_known``."""
        known = {*self._option_string_actions, *also_known}
        for word in words:
            flag = word.partition("=")[0]
            if flag.startswith("--") and flag not in known:
                near = nearest(flag, known)
                self.error(f"unknown flag {flag}" + (f"; did you mean {near}?" if near else ""))

    def refuse_repeated(self, words: Sequence[str]) -> None:
        """End with a message when a flag that takes one value is given twice: only the last would count."""
        seen: set[str] = set()
        for flag in (word.partition("=")[0] for word in words):
            action = self._option_string_actions.get(flag)
            if flag in seen and not isinstance(action, argparse._AppendAction):
                self.error(f"{flag} is given twice; give it once")
            if action is not None:
                seen.add(flag)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, without the list of all flags."""
        text = message.removeprefix("argument ")
        end = "" if text.endswith((".", "?")) else "."
        sys.stderr.write(f"\nerror: {text}{end} {self.prog} --help lists every flag.\n")
        raise SystemExit(1)


def nearest(flag: str, known: Iterable[str]) -> str | None:
    """The known flag that a misspelled one must have meant; None when none is near.

    Example:
        >>> nearest("--lerning_rate", ["--learning_rate"]), nearest("--early_stop", ["--learning_rate"])
        ('--learning_rate', None)
    """
    names = sorted(known)
    longer = [name for name in names if name.startswith(flag) and len(flag) > len("--xxx")]
    close = difflib.get_close_matches(flag, names, n=1, cutoff=0.8)
    return next(iter([*close, *longer]), None)


def add_fields(parser: argparse._ActionsContainer, group: type, names: Collection[str] | None = None) -> None:
    """Add a flag for each field of a dataclass.

    Args:
        parser: Gets the flags.
        group: The dataclass; its fields have ``help``, and may have ``choices``, ``nargs`` and ``const``.
        names: Only these fields.
    """
    hints = get_type_hints(group)
    for one in fields(group):
        if names is not None and one.name not in names:
            continue
        hint = hints[one.name]  # a type, or a type and None
        kind = get_args(hint)[0] if NoneType in get_args(hint) else hint
        how = flag_reader(kind, choices=one.metadata.get("choices"))
        how |= {name: one.metadata[name] for name in ("nargs", "const") if name in one.metadata}
        default = one.default if one.default_factory is MISSING else one.default_factory()
        text = one.metadata["help"].replace("%", "%%")
        parser.add_argument(f"--{one.name}", default=default, help=text, **how)
        if kind is bool and default is True:
            parser.add_argument(
                f"--no_{one.name}", dest=one.name, action="store_false", help=argparse.SUPPRESS
            )


def flag_reader(kind: Any, *, choices: Sequence[Any] | None = None, optional: bool = False) -> dict[str, Any]:
    """How a value is read, as arguments of ``add_argument``.

    Args:
        kind: ``bool``, ``int``, ``float``, ``str``, ``dict`` (JSON, or a file's name), ``list`` (of texts),
            ``list[int]``, or a tuple of choices.
        choices: The values it takes.
        optional: Whether the flag alone means ``true``.
    """
    if isinstance(kind, tuple):
        kind, choices = str, kind
    if choices is not None:
        by_text = {str(choice): choice for choice in choices}
        reader = _expecting(f"one of {', '.join(by_text)}", by_text.__getitem__)
        how: dict[str, Any] = {"type": reader, "metavar": "CHOICE"}
    else:
        how = {"type": _READERS.get(get_args(kind)[0] if get_args(kind) else kind, str)}
    if list in (kind, get_origin(kind)):
        how["nargs"] = "+"
    if kind is bool or optional:
        how |= {"nargs": "?", "const": True if kind is bool else "true"}
    return how


def _expecting(expected: str, read: Callable[[str], Any]) -> Callable[[str], Any]:
    """A reader whose message says what was expected."""

    def value(text: str) -> Any:
        try:
            return read(text)
        except (ValueError, KeyError):
            raise argparse.ArgumentTypeError(f"found {text!r}, expected {expected}") from None

    return value


def switch(text: str) -> bool:
    """true or false, in any of the usual spellings.

    Example:
        >>> switch("True"), switch("0")
        (True, False)
    """
    if text.lower() in ("true", "t", "1", "yes", "y"):
        return True
    if text.lower() in ("false", "f", "0", "no", "n"):
        return False
    raise argparse.ArgumentTypeError(f"found {text!r}, expected true or false")


_READERS = {bool: switch, int: _expecting("a whole number", int), float: _expecting("a number", float)}


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


def add_switch(parser: argparse._ActionsContainer, name: str, *, default: bool | None, help: str) -> None:
    """Add a flag that is set by its name alone, or by ``true`` or ``false`` behind it."""
    parser.add_argument(name, type=switch, nargs="?", const=True, default=default, help=help)


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Which model answers, how it is loaded, and how it sees images and videos."""
    group = parser.add_argument_group("Model")
    group.add_argument(
        "--model_name_or_path",
        help="The model: a checkpoint's folder or a Hub id. May be left out with --adapter, which names its base.",
    )
    group.add_argument("--adapter", help="Folder of a LoRA adapter, also of the early official scripts.")
    group.add_argument(
        "--dtype", default="auto", choices=DTYPES,
        help="Precision of the weights. auto: on a GPU 16 bit, if stored so; on a CPU fp32 for small models.",
    )  # fmt: skip
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
    add_switch(group, "--load_4bit", default=False, help="Load the language model in 4 bit (bitsandbytes).")
    group.add_argument(
        "--attn_implementation", default="sdpa", choices=["sdpa", "eager", "flash_attention_2"],
        help="How the language model computes attention.",
    )  # fmt: skip
    group.add_argument("--cache_dir", help="Where checkpoints from the Hub are kept.")
    add_switch(
        group, "--allow_other_base", default=False, help="Use an adapter on a model it was not trained on."
    )
    group = parser.add_argument_group("Images and videos")
    opened = (
        "image_folder", "allow_remote_images", "max_image_pixels", "exif_orientation", "literal_control_tokens",
        "stack_frames", "video_sound",
    )  # fmt: skip
    add_fields(group, DataArguments, opened)
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
    group.add_argument(
        "--downsample_mode", choices=["4x", "16x"],
        help="MiniCPM-V 4.6 and 4.7, MiniCPM-OCR: 4x sees four times the tokens of 16x. Unset: that of the adapter's "
        "training, else the checkpoint's.",
    )  # fmt: skip
    group.add_argument(
        "--audio_prompt", choices=["chat", "plain"],
        help="MiniCPM-o: the form of a conversation with audio, as in its training. Unset: chat.",
    )  # fmt: skip


def read_answering_flags(
    parser: CommandParser, argv: Sequence[str], *, sampling: bool, max_new_tokens: int
) -> argparse.Namespace:
    """Read the command line of a command that lets a model answer. A flag without effect ends it with a message.

    Args:
        parser: Has the command's own flags; gets those of the model, of images and videos, and of answers.
        argv: The command line.
        sampling: The default of ``--sampling``.
        max_new_tokens: The default of ``--max_new_tokens``.
    """
    _add_model_flags(parser)
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
    add_switch(
        group, "--enable_thinking", default=None,
        help="Let the model think first (V-4.5 and later). Unset: only if its chat template does so by itself, as that "
        "of MiniCPM-V 4.6-Thinking.",
    )  # fmt: skip
    group.add_argument("--system_prompt", default="", help="A system message in front of every conversation.")
    values = parser.parse_args(argv)
    given = [name for name in ("temperature", "top_p", "top_k") if getattr(values, name) is not None]
    if given and not values.sampling:
        parser.error(
            f"--{given[0]} is given, but --sampling is false: set it to true, or leave --{given[0]} out"
        )
    return values
