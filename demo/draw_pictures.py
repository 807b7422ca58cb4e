"""Draws a picture-question data set: real image files, and rows in the official JSON format.

    python draw_pictures.py FOLDER [--train 1500] [--eval 72] [--held_out 144] [--seed 0]

Every picture shows one shape in one colour at one of nine places. Most pictures are small; one in eight
is large enough to be cut into slices by a checkpoint with ``scale_resolution`` 112. Two tasks are asked
about the same pictures:

- ``questions``: what colour, what shape and where, three turns per picture, one or two words each;
- ``descriptions``: one sentence with all three, in words the first task never used.

Colours, shapes and places are drawn equally often and independently of each other, in each of the three
files of a task, so that an answer can't be told from the question. ``chance`` counts that exactly.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 150, 60),
    "blue": (40, 80, 210),
    "yellow": (240, 205, 30),
    "purple": (140, 60, 170),
    "orange": (245, 130, 20),
    "black": (25, 25, 25),
    "cyan": (40, 190, 205),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = (
    "top left", "top", "top right",
    "left", "centre", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
QUESTIONS = {
    "colour": "What colour is the shape?",
    "shape": "What shape is it?",
    "place": "Where is it?",
}
REQUEST = "Describe the picture."
TASKS = ("questions", "descriptions")
PARTS = ("train", "eval", "held_out")
_LARGE_EVERY = 8


@dataclass(frozen=True)
class Scene:
    """What a picture shows."""

    colour: str
    shape: str
    place: str


def draw_data_set(folder: Path, *, sizes: dict[str, int], seed: int) -> dict[str, Path]:
    """Draw all pictures and write the six files of rows.

    Args:
        folder: Where to; pictures go into ``pictures``, rows beside it.
        sizes: Number of pictures for each of ``PARTS``.
        seed: The same seed draws the same pictures.

    Returns:
        ``<task>_<part>`` -> file of rows.
    """
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    files = {}
    for part in PARTS:
        rows: dict[str, list[dict[str, Any]]] = {task: [] for task in TASKS}
        for index, scene in enumerate(_balanced_scenes(sizes[part], rng)):
            name = f"{part}_{index:05d}"
            path = folder / "pictures" / (name + (".jpg" if index % 3 == 0 else ".png"))
            draw(scene, rng, large=index % _LARGE_EVERY == 0).save(path, quality=92)
            for task in TASKS:
                rows[task].append(
                    {"id": name, "image": f"pictures/{path.name}", "conversations": ask(task, scene)}
                )
        for task in TASKS:
            files[f"{task}_{part}"] = file = folder / f"{task}_{part}.json"
            file.write_text(json.dumps(rows[task], indent=1), encoding="utf-8")
    return files


def ask(task: str, scene: Scene) -> list[dict[str, str]]:
    """The conversation about a picture."""
    if task == "descriptions":
        answer = f"A {scene.shape}, painted {scene.colour}, near the {scene.place}."
        return _turns([(REQUEST, answer)])
    return _turns([(text, getattr(scene, kind)) for kind, text in QUESTIONS.items()])


def sentences() -> Iterator[str]:
    """Every question and answer there is; what a small tokenizer should have whole words for."""
    for colour in COLOURS:
        for shape in SHAPES:
            for place in PLACES:
                for task in TASKS:
                    yield from (turn["content"] for turn in ask(task, Scene(colour, shape, place)))


def chance(rows: list[dict[str, Any]]) -> float:
    """Share of answers that the best guess from the text alone gets right.

    The text in front of an answer is the question (the earlier answers of a row are independent of it);
    the best guess is the most frequent answer to it.

    Args:
        rows: Rows in the official format.

    Returns:
        The share, from 0 to 1.
    """
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        turns = row["conversations"]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            answers[question["content"].removeprefix("<image>\n")][answer["content"]] += 1
    right = sum(counter.most_common(1)[0][1] for counter in answers.values())
    return right / sum(counter.total() for counter in answers.values())


def draw(scene: Scene, rng: random.Random, *, large: bool) -> Image.Image:
    """Draw a scene: about 84 to 112 pixels a side, or 160 to 280 when large."""
    low, high = (160, 280) if large else (84, 112)
    width, height = rng.randint(low, high), rng.randint(low, high)
    light = tuple(rng.randint(215, 250) for _ in range(3))
    image = Image.new("RGB", (width, height), light)
    third = PLACES.index(scene.place)
    x, y = (_jitter(third % 3, width, rng), _jitter(third // 3, height, rng))
    radius = min(width, height) * rng.uniform(0.13, 0.165)
    pencil = ImageDraw.Draw(image)
    if scene.shape == "circle":
        pencil.ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLOURS[scene.colour])
    else:
        outline = [(x + dx * radius, y + dy * radius) for dx, dy in _OUTLINES[scene.shape]]
        pencil.polygon(outline, fill=COLOURS[scene.colour])
    return image


_ARM = 0.34
_OUTLINES = {
    "square": [(-0.95, -0.95), (0.95, -0.95), (0.95, 0.95), (-0.95, 0.95)],
    "triangle": [(0, -1.1), (1.1, 0.95), (-1.1, 0.95)],
    "cross": [
        (-_ARM, -1.1), (_ARM, -1.1), (_ARM, -_ARM), (1.1, -_ARM), (1.1, _ARM), (_ARM, _ARM),
        (_ARM, 1.1), (-_ARM, 1.1), (-_ARM, _ARM), (-1.1, _ARM), (-1.1, -_ARM), (-_ARM, -_ARM),
    ],
}  # fmt: skip


def _jitter(third: int, side: int, rng: random.Random) -> float:
    """A coordinate near the middle of a third of a side, in pixels."""
    return side * (1 + 2 * third + rng.uniform(-0.1, 0.1)) / 6


def _balanced_scenes(count: int, rng: random.Random) -> list[Scene]:
    """Scenes in which each colour, each shape and each place comes equally often, in random company."""

    def deal(values: tuple[str, ...]) -> list[str]:
        dealt = [values[index % len(values)] for index in range(count)]
        rng.shuffle(dealt)
        return dealt

    dealt = zip(deal(tuple(COLOURS)), deal(SHAPES), deal(PLACES), strict=True)
    return [Scene(*values) for values in dealt]


def _turns(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    turns = []
    for number, (question, answer) in enumerate(pairs):
        content = f"<image>\n{question}" if number == 0 else question
        turns += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return turns


def main() -> None:
    """Draw a data set, as the command line says."""
    parser = argparse.ArgumentParser(description="Draw a picture-question data set.")
    parser.add_argument("folder", type=Path)
    for part, count in (("train", 1500), ("eval", 72), ("held_out", 144)):
        parser.add_argument(f"--{part}", type=int, default=count, help=f"pictures (default: {count})")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sizes = {part: getattr(arguments, part) for part in PARTS}
    draw_data_set(arguments.folder, sizes=sizes, seed=arguments.seed)


if __name__ == "__main__":
    main()
