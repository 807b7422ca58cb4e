"""What the tests of the data side share: checkpoint folders made of the goldens, and data files."""

from __future__ import annotations

import atexit
import json
import shutil
import socket
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from minicpm_tune.data.row_parsing import parse_row
from minicpm_tune.data.samples import Processing, load_processing
from minicpm_tune.settings.data_arguments import DataArguments
from support.paths import GOLDENS, IMAGES, ROOT
from support.processes import Started, environment

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
    return load_processing(checkpoint_folder(name), DataArguments.of_checkpoint(**options))


def limited(prepared: Processing, limit: int, **options) -> Processing:
    """The same with a --model_max_length."""
    arguments = replace(prepared.arguments, model_max_length=limit, **options)
    return replace(prepared, arguments=arguments)


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


SMALL = str(IMAGES / "small.png")
WIDE = str(IMAGES / "wide.png")


def good(number=0, image=SMALL):
    return {"id": f"good-{number}", "image": image, "conversations": chat("What is it?", f"Answer {number}.")}


BAD_ROWS = [
    good(0),
    {"id": "roles", "conversations": [{"role": "cat", "content": "x"}]},
    good(2, image="missing.png"),
    {"id": "many", "image": SMALL, "conversations": chat("<image_07>", "x")},
    {"conversations": chat("What?", "A <|im_end|> mark.")},
    {"id": "long", "conversations": chat("What? " * 400, "Too far back.")},
]

RANK = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch.distributed as dist
from dataset import SupervisedDataset
from minicpm_tune.data.row_check import check_rows
from minicpm_tune.data.samples import load_processing
from minicpm_tune.errors import DataError
from minicpm_tune.settings.data_arguments import DataArguments

dist.init_process_group("gloo")
arguments = DataArguments.of_checkpoint(model_max_length=512, on_bad_row=sys.argv[4])
rows = SupervisedDataset(sys.argv[3], load_processing(sys.argv[2], arguments))
try:
    found = {"lengths": check_rows(rows).tolist(), "left_out": sorted(rows.left_out)}
except DataError as error:
    found = {"error": str(error)}
dist.barrier()
sys.stdout.write(json.dumps(found))
dist.destroy_process_group()
"""


def on_two_ranks(path, on_bad_row):
    """What two processes find, as they print it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = [
        sys.executable,
        "-c",
        RANK,
        str(ROOT / "finetune"),
        str(checkpoint_folder("v2_6")),
        str(path),
        on_bad_row,
    ]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    both = [Started(words, env={**environment(), **shared, "RANK": str(rank)}) for rank in range(2)]
    return [json.loads(process.end(limit=120).stdout) for process in both]
