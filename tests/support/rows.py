"""Rows of data files, good and bad, and the pictures in them."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from minicpm_tune.data.row_parsing import parse_row
from support.paths import IMAGES

SMALL = str(IMAGES / "small.png")
WIDE = str(IMAGES / "wide.png")


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


def turns_of(messages, **row):
    return parse_row({"conversations": messages, **row}).turns


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


def picture(name="small"):
    return Image.open(IMAGES / f"{name}.png").convert("RGB")
