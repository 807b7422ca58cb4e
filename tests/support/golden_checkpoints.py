"""Folders with a golden generation's config and tokenizer, and the samples they make; no weights."""

from __future__ import annotations

import atexit
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from minicpm_tune.data.samples import Processing, load_processing
from minicpm_tune.settings.data_arguments import DataArguments
from support.paths import GOLDENS, LAYOUTS
from support.rows import turns_of

ALL = ("v2", "v2_5", "v2_6", "o2_6", "v4", "v4_5", "v4_6", "v4_7")
WITH_GOLDENS = ALL[1:]
# Without goldens of their own, and whose tokenizer they have.
_RELATIVES = {"v4_6_thinking": "v4_6", "v4_7_moe": "v4_7", "ocr_1": "v4_6"}


@cache
def checkpoint_folder(name: str) -> Path:
    """A folder with a golden generation's config and tokenizer files, as a checkpoint has them."""
    folder = Path(mkdtemp(prefix=f"minicpmv-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    golden = GOLDENS / _RELATIVES.get(name, name)
    for file in (golden / "config.json", *(golden / "tokenizer").iterdir()):
        shutil.copy(file, folder)
    if name in _RELATIVES:
        for file in (LAYOUTS / name).iterdir():
            shutil.copy(file, folder)
    return folder


@cache
def processing(name: str, **options) -> Processing:
    return load_processing(checkpoint_folder(name), DataArguments.of_checkpoint(**options))


def limited(prepared: Processing, limit: int, **options) -> Processing:
    """The same with a --model_max_length."""
    arguments = replace(prepared.arguments, model_max_length=limit, **options)
    return replace(prepared, arguments=arguments)


def supervised_text(sample, tokenizer) -> str:
    labels = sample["labels"]
    return tokenizer.decode(labels[labels != -100])


def encoded(name, messages, images=(), row=None, **options):
    prepared = processing(name, **options)
    return prepared.encode(turns_of(messages, **(row or {})), images), prepared.tokenizer
