"""Draws a data set for pointing: pictures of one shape, and rows whose answer is its box.

    python draw_boxes.py FOLDER [--train 4800] [--eval 48] [--held_out 100] [--seed 0]

Rows name the shape and give its box in pixels, in ``objects`` (docs/data.md). The edges of a shape lie on tenths of
its picture, and a side takes four to seven of them: a small model learns to read a place from a picture soon, and to
spell any number exactly only much later. ``best_guess`` is what a model scores that does not look at the picture.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "finetune")]

from draw_pictures import BACKGROUNDS, COLORS, shade
from minicpm_tune.data.grounding import intersection_over_union

QUESTION = "Where is the <ref-object>?"
PARTS = {"train": 4800, "eval": 48, "held_out": 100}
SHAPES = ("circle", "square")
DARK = ("red", "green", "blue", "purple", "black")  # the shapes, keys of COLORS
PALE = ("white", "pink", "sky", "mint")  # the grounds, keys of BACKGROUNDS
TENTHS = 10
SIDES = (4, 7)  # tenths of the picture
PICTURE = (84, 112)  # pixels; up to 112 x 112 a picture is not cut into slices


def draw_data_set(folder: Path, *, sizes: dict[str, int], seed: int) -> dict[str, Path]:
    """Draw all pictures and write the three files of rows.

    Args:
        folder: Where to; pictures go into ``pictures``, rows beside it.
        sizes: Number of pictures for each of ``PARTS``.
        seed: The same seed draws the same pictures.

    Returns:
        ``boxes_train``, ``boxes_eval``, ``held_out`` -> file of rows.
    """
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    files = {}
    for part in PARTS:
        rows = []
        for index in range(sizes[part]):
            image, name, box = draw(rng)
            path = folder / "pictures" / f"{part}_{index:05d}.png"
            image.save(path)
            rows.append(row(path.stem, f"pictures/{path.name}", name, box))
        title = part if part == "held_out" else f"boxes_{part}"
        files[title] = folder / f"{title}.json"
        files[title].write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return files


def draw(rng: random.Random) -> tuple[Image.Image, str, list[float]]:
    """A picture, the name of its shape, and the shape's box in pixels."""
    width, height = rng.randint(*PICTURE), rng.randint(*PICTURE)
    image = Image.new("RGB", (width, height), shade(BACKGROUNDS[rng.choice(PALE)][1], rng))
    color, shape = rng.choice(DARK), rng.choice(SHAPES)
    across, down = rng.randint(*SIDES), rng.randint(*SIDES)
    left, top = rng.randint(0, TENTHS - across), rng.randint(0, TENTHS - down)
    box = [
        left * width / TENTHS, top * height / TENTHS,
        (left + across) * width / TENTHS, (top + down) * height / TENTHS,
    ]  # fmt: skip
    pencil = ImageDraw.Draw(image)
    (pencil.ellipse if shape == "circle" else pencil.rectangle)(box, fill=shade(COLORS[color][1], rng))
    return image, f"{color} shape", box


def row(name: str, image: str, shape: str, box: list[float]) -> dict[str, Any]:
    """A row in the official form, with ``objects``."""
    turns = [{"role": "user", "content": f"<image>\n{QUESTION}"}, {"role": "assistant", "content": "<bbox>"}]
    objects = {"ref": [shape], "bbox": [[round(value, 2) for value in box]]}
    return {"id": name, "image": image, "conversations": turns, "objects": objects}


def best_guess(boxes: list[tuple[float, ...]], known: list[tuple[float, ...]]) -> dict[str, float]:
    """What the one box scores that overlaps most boxes by one half.

    Args:
        boxes: The expected boxes, from 0 to 1000.
        known: The boxes to choose from, such as those of the training rows.

    Returns:
        ``iou_50`` and ``mean_iou``.

    Example:
        >>> best_guess([(0, 0, 2, 2), (0, 0, 2, 1)], [(0, 0, 2, 2), (5, 5, 6, 6)])
        {'iou_50': 1.0, 'mean_iou': 0.75}
    """
    found = []
    for guess in Counter(known):
        overlaps = [intersection_over_union(guess, box) for box in boxes]
        found.append((sum(each >= 0.5 for each in overlaps) / len(boxes), sum(overlaps) / len(boxes)))
    hits, mean = max(found)
    return {"iou_50": hits, "mean_iou": mean}


def main() -> None:
    """Draw a data set, as the command line says."""
    parser = argparse.ArgumentParser(description="Draw a data set for pointing at shapes.")
    parser.add_argument("folder", type=Path)
    for part, count in PARTS.items():
        parser.add_argument(f"--{part}", type=int, default=count, help=f"pictures (default: {count})")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sizes = {part: getattr(arguments, part) for part in PARTS}
    draw_data_set(arguments.folder, sizes=sizes, seed=arguments.seed)


if __name__ == "__main__":
    main()
