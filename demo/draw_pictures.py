"""Draws a picture-question data set: real image files, and rows in the official JSON format.

    python draw_pictures.py FOLDER [--train 1536] [--eval 48] [--held_out 96] [--seed 0]

Every picture shows one shape in one color on a ground of another; which shape it is, where it stands and
how large it is, distract. Most pictures are small; one in eight is large enough to be cut into slices by a
checkpoint with ``scale_resolution`` 112. Two tasks are asked about the same pictures:

- ``questions``: the color of the shape and that of the background, in either order, in two turns of one word
  each (a model with a think block is trained on the last turn as it will be asked, on earlier ones as history);
- ``descriptions``: one sentence with both, in words that the first task never used.

Each task has rows to train on and to evaluate; ``held_out.json`` asks both tasks about further pictures, one
row per question. Everywhere all pairs of colors come equally often, in random company, so that neither the
question nor an earlier answer tells the next one. ``chance`` counts that exactly.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

Color = tuple[int, int, int]

# What the first task calls a color -> what the second calls it, and its red, green and blue.
COLORS: dict[str, tuple[str, Color]] = {
    "red": ("crimson", (205, 30, 35)),
    "green": ("emerald", (25, 130, 50)),
    "blue": ("sapphire", (35, 70, 205)),
    "yellow": ("golden", (235, 205, 20)),
    "purple": ("violet", (130, 45, 165)),
    "orange": ("amber", (240, 125, 15)),
    "black": ("ebony", (20, 20, 20)),
    "cyan": ("teal", (20, 175, 190)),
}
BACKGROUNDS: dict[str, tuple[str, Color]] = {
    "white": ("ivory", (245, 245, 242)),
    "gray": ("slate", (140, 140, 145)),
    "pink": ("rose", (250, 180, 200)),
    "sky": ("azure", (165, 205, 250)),
    "mint": ("jade", (165, 240, 185)),
    "brown": ("chestnut", (120, 80, 50)),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = 9  # three by three, row by row
QUESTIONS = {"color": "What color is the shape?", "background": "What color is the background?"}
REQUEST = "Describe the picture."
TASKS = ("questions", "descriptions")
PARTS = {"train": 1536, "eval": 48, "held_out": 96}
_LARGE_EVERY = 8
_SHADE = 8  # how far a color may lie from its list value, of 255


@dataclass(frozen=True)
class Scene:
    """What a picture shows, and what is asked first.

    Attributes:
        color: A key of ``COLORS``.
        background: A key of ``BACKGROUNDS``.
        first: The question that comes first, a key of ``QUESTIONS``.
        shape: One of ``SHAPES``.
        place: A number below ``PLACES``.
    """

    color: str
    background: str
    first: str = "color"
    shape: str = SHAPES[0]
    place: int = 0


def draw_data_set(folder: Path, *, sizes: dict[str, int], seed: int) -> dict[str, Path]:
    """Draw all pictures and write the five files of rows.

    Args:
        folder: Where to; pictures go into ``pictures``, rows beside it.
        sizes: Number of pictures for each of ``PARTS``.
        seed: The same seed draws the same pictures.

    Returns:
        ``<task>_<part>`` or ``held_out`` -> file of rows.
    """
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    files: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for part in PARTS:
        for index, scene in enumerate(_balanced_scenes(sizes[part], rng)):
            name = f"{part}_{index:05d}"
            path = folder / "pictures" / (name + (".jpg" if index % 3 == 0 else ".png"))
            draw(scene, rng, large=index % _LARGE_EVERY == 0).save(path, quality=92)
            for task in TASKS:
                row = {"id": name, "image": f"pictures/{path.name}", "conversations": ask(task, scene)}
                if part == "held_out":
                    files[part] += _one_per_question(row)
                else:
                    files[f"{task}_{part}"].append(row)
    for name, rows in files.items():
        (folder / f"{name}.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return {name: folder / f"{name}.json" for name in files}


def ask(task: str, scene: Scene) -> list[dict[str, str]]:
    """The conversation about a picture."""
    if task == "descriptions":
        figure, ground = COLORS[scene.color][0], BACKGROUNDS[scene.background][0]
        return _turns([(REQUEST, f"The figure is {figure} and the ground is {ground}.")])
    kinds = sorted(QUESTIONS, key=lambda kind: kind != scene.first)
    return _turns([(QUESTIONS[kind], getattr(scene, kind)) for kind in kinds])


def sentences() -> Iterator[str]:
    """Every question and answer there is; what a small tokenizer should have whole words for."""
    for color, background, first, task in product(COLORS, BACKGROUNDS, QUESTIONS, TASKS):
        yield from (turn["content"] for turn in ask(task, Scene(color, background, first)))


def chance(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Share of rows in which the best guess from the text alone gives the last answer.

    The text is all that was said before, earlier answers included; the best guess is the answer that follows
    that text most often.

    Args:
        rows: Rows in the official format.

    Returns:
        Last question -> the share, from 0 to 1.

    Example:
        >>> turn = lambda content: {"content": content}
        >>> chance([{"conversations": [turn("<image>\\nHow many?"), turn(n)]} for n in "1121"])
        {'How many?': 0.75}
    """
    answers: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for row in rows:
        *said, question, answer = [turn["content"] for turn in row["conversations"]]
        answers[without_placeholder(question)]["\n".join(said)][answer] += 1
    shares = {}
    for question, counters in answers.items():
        right = sum(counter.most_common(1)[0][1] for counter in counters.values())
        shares[question] = right / sum(counter.total() for counter in counters.values())
    return shares


def without_placeholder(text: str) -> str:
    """A question without the mark for its picture or sound."""
    return text.removeprefix("<image>\n").removeprefix("<audio>\n")


def draw(scene: Scene, rng: random.Random, *, large: bool) -> Image.Image:
    """Draw a scene: about 84 to 112 pixels a side, or 160 to 280 when large."""
    low, high = (160, 280) if large else (84, 112)
    width, height = rng.randint(low, high), rng.randint(low, high)
    image = Image.new("RGB", (width, height), shade(BACKGROUNDS[scene.background][1], rng))
    fill = shade(COLORS[scene.color][1], rng)
    x, y = (_jitter(scene.place % 3, width, rng), _jitter(scene.place // 3, height, rng))
    radius = min(width, height) * rng.uniform(0.2, 0.24)
    pencil = ImageDraw.Draw(image)
    if scene.shape == "circle":
        pencil.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    else:
        outline = [(x + dx * radius, y + dy * radius) for dx, dy in _OUTLINES[scene.shape]]
        pencil.polygon(outline, fill=fill)
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


def shade(color: Color, rng: random.Random) -> Color:
    red, green, blue = (min(max(value + rng.randint(-_SHADE, _SHADE), 0), 255) for value in color)
    return red, green, blue


def _jitter(third: int, side: int, rng: random.Random) -> float:
    """A coordinate near the first, second or third quarter mark of a side, in pixels."""
    return side * (1 + third + rng.uniform(-0.05, 0.05)) / 4


def _balanced_scenes(count: int, rng: random.Random) -> list[Scene]:
    """Scenes in which each pair of colors comes equally often in each order, and each shape and place too."""

    def deal(values: list[Any]) -> list[Any]:
        dealt = [values[index % len(values)] for index in range(count)]
        rng.shuffle(dealt)
        return dealt

    asked = list(product(COLORS, BACKGROUNDS, QUESTIONS))
    rng.shuffle(asked)
    dealt = zip(deal(asked), deal(list(SHAPES)), deal(list(range(PLACES))), strict=True)
    return [Scene(*words, shape, place) for words, shape, place in dealt]


def _one_per_question(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that end with the first answer, the second, and so on."""
    turns = row["conversations"]
    return [{**row, "conversations": turns[:end]} for end in range(2, len(turns) + 1, 2)]


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
    for part, count in PARTS.items():
        parser.add_argument(f"--{part}", type=int, default=count, help=f"pictures (default: {count})")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sizes = {part: getattr(arguments, part) for part in PARTS}
    draw_data_set(arguments.folder, sizes=sizes, seed=arguments.seed)


if __name__ == "__main__":
    main()
