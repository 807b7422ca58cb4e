"""What the tests of the data side share: checkpoint folders made of the goldens, and data files."""

from __future__ import annotations

import atexit
import json
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from processing import Processing, load_processing
from records import parse_row

GOLDENS = Path(__file__).resolve().parent / "goldens"
IMAGES = GOLDENS / "images"
ALL = ("v2", "v2_5", "v2_6", "o2_6", "v4", "v4_5", "v4_6", "v4_7")
WITH_GOLDENS = ALL[1:]


@cache
def checkpoint_folder(name: str) -> Path:
    """A folder with a golden generation's config and tokenizer files, as a checkpoint has them."""
    folder = Path(mkdtemp(prefix=f"minicpmv-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shutil.copy(GOLDENS / name / "config.json", folder)
    for file in (GOLDENS / name / "tokenizer").iterdir():
        shutil.copy(file, folder)
    return folder


@cache
def processing(name: str, **options) -> Processing:
    return load_processing(checkpoint_folder(name), **options)


def write_rows(folder: Path, rows: list, name: str = "train.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def chat(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    """user, assistant, user, ... messages."""
    messages = [
        {"role": "assistant" if number % 2 else "user", "content": text} for number, text in enumerate(texts)
    ]
    return [{"role": "system", "content": system}, *messages] if system else messages


def supervised_text(sample, tokenizer) -> str:
    labels = sample["labels"]
    return tokenizer.decode(labels[labels != -100])


def turns_of(messages, **row):
    return parse_row({"conversations": messages, **row}).turns


def encoded(name, messages, images=(), row=None, **options):
    prepared = processing(name, **options)
    return prepared.encode(turns_of(messages, **(row or {})), images), prepared.tokenizer
