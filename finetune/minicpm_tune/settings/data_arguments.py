"""Everything that decides how rows become samples: the data's flags, and the grammar of ``--data_path``.

No torch is imported here.
"""

from __future__ import annotations

import glob
import re
import shlex
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from minicpm_tune.errors import DataError

# Twice Pillow's default warning limit, where Pillow itself would refuse.
DEFAULT_MAX_PIXELS = 178_956_970
_AMOUNT = re.compile(r"(?P<path>.+?)(?:#(?P<count>\d+)|:(?P<weight>\d*\.?\d+))", re.DOTALL)


def flag(default: Any, help: str, **more: Any) -> Any:
    """A field that is a flag of the command line; ``more`` may be ``choices``, ``nargs``, and ``const``."""
    return field(default=default, metadata={"help": help, **more})


@dataclass
class RowLimits:
    """How long a row may be and how finely its images are cut.

    The official script has both in its TrainingArguments; ours inherits them there too, and one flag fills both.
    """

    model_max_length: int | None = flag(
        2048,
        "Longest row, in tokens, image placeholders included. --overlength says what happens to longer "
        "rows; by default they are cut at the end, never inside an image.",
    )
    max_slice_nums: int | None = flag(
        9,
        "Most slices an image is cut into, the overview not counted. More slices see finer detail and "
        "cost 64 to 96 tokens each.",
    )


@dataclass
class DataArguments(RowLimits):
    """Which rows are learned from, and how they become samples."""

    _argument_group_name = "Data"

    data_path: str | None = flag(
        None,
        "The training rows: JSON, JSONL, CSV, Parquet or a Hugging Face datasets folder, with #count or "
        ":weight behind it; several, separated by commas; or a .txt list of them (docs/data.md).",
    )
    eval_data_path: str | None = flag(
        None,
        "The evaluation rows, same format. Needed by --do_eval and --eval_strategy, without --eval_split.",
    )
    eval_split: float | None = flag(
        None,
        "Without --eval_data_path: hold rows out of training for the evaluation, a fraction (0.01) or a "
        "number of rows (200). Rows that share a picture stay on one side. The seed (--data_seed, or --seed) and "
        "the pictures decide, not the rows' order: with a fraction, a row keeps its side when rows are added.",
    )
    max_samples: int | None = flag(
        None,
        "Use only the first N rows of each training file, before --eval_split divides them. A #count then takes at "
        "most N.",
    )
    eval_max_samples: int | None = flag(
        None, "The same for each file of --eval_data_path, or for what --eval_split holds out of each."
    )
    columns: str | None = flag(
        None,
        "New names for the columns of a table or the keys of rows, as JSON: "
        '\'{"query": "user", "response": "assistant", "image_path": "image"}\'. The names are those of '
        "docs/data.md, section Forms; in a mixture, each file is renamed where it has the columns.",
    )
    image_folder: str | None = flag(
        None,
        "Folder that relative image and video paths start from. Default: the folder of the data file, and "
        "then the current folder.",
    )
    allow_remote_images: bool = flag(
        False, "Fetch images given as http(s) addresses; otherwise they are bad rows."
    )
    max_image_pixels: int = flag(
        DEFAULT_MAX_PIXELS,
        "Most pixels an image may have once decoded, against files that unfold to gigabytes; 0 for no limit.",
    )
    exif_orientation: str = flag(
        "auto",
        "Whether images are turned upright by their EXIF orientation. auto: as inference does, which is "
        "no up to V-4.5 and yes for 4.6 and 4.7.",
        choices=["auto", "apply", "ignore"],
    )
    enable_thinking: str = flag(
        "auto",
        "Thinking mode of V-4.5 and later. auto: an answer that holds <think>...</think> is trained with "
        "it, any other behind the empty think block. Every prompt of V-4.6-Thinking opens thoughts, and an answer "
        "without any learns to close them. true: every prompt asks for thoughts. false: every prompt has the "
        "empty think block, and thoughts in answers are left out.",
        choices=["auto", "true", "false"],
    )
    audio_prompt: str | None = flag(
        None,
        "MiniCPM-o: the prompt of a conversation with audio. chat (default): the speech form that the "
        "released chat() writes. plain: the form without speech tokens, which vLLM and other trainers use.",
        choices=["chat", "plain"],
    )
    train_on: str = flag(
        "all_turns",
        'Which answers are supervised. A message with "loss": false never is.',
        choices=["all_turns", "last_turn"],
    )
    literal_control_tokens: bool = flag(
        False,
        "Whether control texts in messages (<|im_end|>, </s>, <image> without an image, ...) are encoded "
        'as plain text. false: such a row is a bad row, unless it sets "literal_control_tokens": true or writes a '
        "backslash in front of the text.",
    )
    overlength: str = flag(
        "truncate",
        "Rows over --model_max_length. truncate: cut at the limit, inside an answer if need be, in front "
        "of an image if the limit falls into it. drop: left out, counted and listed. error: a bad row. "
        "shrink_slices: fewer slices per image until the row fits, then truncate.",
        choices=["truncate", "drop", "error", "shrink_slices"],
    )
    on_bad_row: str = flag(
        "error",
        "Rows that can't be used. error: the run ends before the model is loaded, with all of them "
        "counted and the first twenty shown. skip: left out and listed in <output_dir>/bad_rows.jsonl. An image "
        "that becomes unreadable during training is left out and listed either way.",
        choices=["error", "skip"],
    )
    check_images: str = flag(
        "auto",
        "How images are checked before training. header: the file exists and is an image. full: it is "
        "decoded. auto: full for up to 500 rows.",
        choices=["auto", "header", "full"],
    )
    video_fps: float | None = flag(
        None,
        "Frames taken per second of video. Default: as the generation's inference: 1, and 3 for V-4.5. A "
        "folder or list of frames counts as sampled at this rate.",
    )
    max_num_frames: int | None = flag(
        None,
        "Most frames of a video; longer ones are thinned out evenly. Default: 64; 128 for 4.6 and 4.7; "
        "180 packs of up to 3 frames for V-4.5.",
    )
    video_sound: bool = flag(
        False,
        "MiniCPM-o: take videos with their sound, a frame and the sound of its second in turn, as the omni "
        'form of the released chat() does. A row\'s "use_audio": true or false goes before it.',
    )
    stack_frames: int | None = flag(
        None,
        "MiniCPM-V 4.6 and 4.7, MiniCPM-OCR: frames that are shown per second of a film. Those after the "
        "first of each second share one composite picture, so that every number above 1 doubles the pictures. "
        "Default: the checkpoint's, which is 1.",
    )
    given_num: bool = flag(
        True, "Whether the amounts in --data_path count (those of a .txt list, too). false: every row once."
    )
    downsample_mode: str | None = flag(
        None,
        "MiniCPM-V 4.6 and 4.7, MiniCPM-OCR: how many patches become one token. 4x gives four times the "
        "tokens of 16x, for fine detail and counting. Default: the checkpoint's, 4x for MiniCPM-OCR.",
        choices=["4x", "16x"],
    )
    img_size: int | None = flag(
        None,
        "InternLM-XComposer2: side of the square that images are resized to, in pixels: 224 for 7b, 490 "
        "for vl-7b. Default: the checkpoint's, which is the only right one. 4khd does not use it.",
    )
    hd_num: int | None = flag(
        None,
        "InternLM-XComposer2-4KHD: most tiles of 336 x 336 pixels that an image is cut into; replaces "
        "--max_slice_nums. -1 for 7b and vl-7b, which don't cut images.",
    )

    def __post_init__(self) -> None:
        if self.stack_frames is not None and self.stack_frames < 1:
            raise DataError(f"--stack_frames: found {self.stack_frames}, expected at least 1. Raise it.")
        for name in ("max_samples", "eval_max_samples"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise DataError(f"--{name}: found {value}, expected at least 1. Raise it, or leave it out.")
        for each in fields(self):
            value, choices = getattr(self, each.name), each.metadata.get("choices")
            if choices and value is not None and value not in choices:
                raise DataError(
                    f"--{each.name}: found {value!r}, expected one of {', '.join(choices)}. Choose one."
                )

    @classmethod
    def of_checkpoint(cls, **values: Any) -> DataArguments:
        """Arguments with no limits but the checkpoint's own: as at inference, unless ``values`` say otherwise."""
        return cls(**{"model_max_length": None, "max_slice_nums": None, **values})


@dataclass(frozen=True)
class MixtureSource:
    """A data file and how much of it an epoch holds.

    Attributes:
        path: The file or folder.
        count: Samples per epoch, or ``None``.
        weight: Samples per epoch as a share of its rows, or ``None``; with neither, every row once.
    """

    path: Path
    count: int | None = None
    weight: float | None = None

    def samples(self, rows: int) -> int:
        """Samples per epoch of a file with so many rows."""
        if self.count is not None:
            return self.count
        return rows if self.weight is None else round(self.weight * rows)


def read_data_path(text: str) -> list[MixtureSource]:
    """Parse ``--data_path``.

    Args:
        text: One path; several, separated by commas, each with an optional ``#count`` or ``:weight``; or a text file
            (``.txt``) with one source per line:

                # path, and thousands of samples per epoch (a fraction is fine)
                cats.json 1.5
                "my dogs.jsonl" 0.2
                birds.parquet#300        exactly 300 samples
                fish.json:0.5            half of its rows; 2 means every row twice
                rest.json                every row once

    Raises:
        DataError: When a mixture file can't be read, or an amount is no number.

    Example:
        >>> read_data_path("cats.json#500,dogs.json:0.5")[1]
        MixtureSource(path=PosixPath('dogs.json'), count=None, weight=0.5)
    """
    whole = Path(text).expanduser()
    if whole.suffix == ".txt":
        return _read_mixture_file(whole)
    if whole.exists() or "," not in text:
        return [_source(text)]
    return [_source(part.strip()) for part in text.split(",") if part.strip()]


def missing_sources(text: str) -> list[Path]:
    """The paths in ``--data_path`` that do not exist; a pattern with ``*`` must match at least one file."""
    paths = [source.path for source in read_data_path(text)]
    return [path for path in paths if not path.exists() and not glob.glob(str(path))]


def _source(text: str) -> MixtureSource:
    whole, found = Path(text).expanduser(), _AMOUNT.fullmatch(text)
    if whole.exists() or not found:
        return MixtureSource(whole)
    count, weight = found["count"], found["weight"]
    amount = float(weight) if count is None else int(count)
    if amount <= 0:
        raise DataError(
            f"--data_path {text}: found the amount {amount}, expected more than 0. Remove the source."
        )
    path = Path(found["path"]).expanduser()
    return MixtureSource(path, weight=amount) if count is None else MixtureSource(path, count=int(count))


def _read_mixture_file(path: Path) -> list[MixtureSource]:
    if path.is_dir():
        raise DataError(
            f"--data_path {path}: found a folder, expected a mixture file. Rename the folder, or give the files in it."
        )
    if not path.is_file():
        raise DataError(f"--data_path {path}: no such file, expected a mixture file. Fix the path.")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"--data_path {path}: not UTF-8 text ({error}). Save the file as UTF-8.") from error
    sources = [source for number, line in enumerate(lines, 1) if (source := _read_line(line, path, number))]
    if not sources:
        raise DataError(
            f"--data_path {path}: found no source, expected lines of a path and an amount. Add one."
        )
    return sources


def _read_line(line: str, file: Path, number: int) -> MixtureSource | None:
    try:
        words = _words(line)
    except ValueError as error:
        raise DataError(
            f"{file}, line {number}: {error} in {line!r}. Quote the path on both sides."
        ) from error
    if not words:
        return None
    if len(words) > 2:
        raise DataError(
            f"{file}, line {number}: found {len(words)} words in {line!r}, expected a path and thousands of samples. "
            "Quote a path that has spaces."
        )
    source = _source(words[0])
    if len(words) == 2:
        source = MixtureSource(source.path, count=_thousands(words[1], f"{file}, line {number}"))
    if (beside := file.parent / source.path).exists():
        return replace(source, path=beside)
    return source


def _words(line: str) -> list[str]:
    """The words of a line, as a shell splits them; a backslash escapes only where one stands before a space.

    Elsewhere it belongs to a Windows path.
    """
    splitter = shlex.shlex(line, posix=True)
    splitter.whitespace_split, splitter.commenters = True, ""
    splitter.escape = "\\" if "\\ " in line else ""
    words = list(splitter)
    comment = next((index for index, word in enumerate(words) if word.startswith("#")), len(words))
    return words[:comment]


def _thousands(word: str, place: str) -> int:
    try:
        count = round(float(word) * 1000)
    except (ValueError, OverflowError):
        count = 0
    if count < 1:
        raise DataError(
            f"{place}: found {word!r}, expected thousands of samples per epoch, at least 0.001. Write 1.5 for 1500."
        )
    return count
