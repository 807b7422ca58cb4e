"""COCO's annotation files (``images``, ``annotations``, ``categories``) -> rows with ``objects``.

Three tasks: ``detect`` asks for every object of a picture, ``refer`` for the boxes of one name (an annotation's
``caption`` where it has one, else its category), ``count`` for their number. Objects come in the order of their
categories, and of one category from left to right, so that the same picture always has the same answer.

A crowd (``iscrowd``) is a region with many objects that were not told apart. It has no box here, and nothing is
asked about the number or the boxes of its category in that picture.

Source: https://cocodataset.org/#format-data; boxes are [left, top, width, height] in pixels.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from minicpm_tune.data.media.images import ImageFile, ImageOptions
from minicpm_tune.data.objects import BOX_MARK, REF_MARK
from minicpm_tune.errors import DataError, RowError

# Task -> what is asked. That of refer is the prompt that the makers of MiniCPM-V name (OpenBMB/MiniCPM-V issue 982).
QUESTIONS = {
    "detect": "Find every object in the picture.",
    "refer": f"Please provide the bounding box coordinate of the region this sentence describes: {REF_MARK}",
    "count": f"How many of {REF_MARK} are in the picture?",
}
NOTHING_FOUND = "There is none."
_KEYS = ("images", "annotations", "categories")

Row = dict[str, Any]
Box = tuple[float, float, float, float]  # x1, y1, x2, y2, in pixels


class CocoFile:
    """An annotation file.

    Attributes:
        left_out: What was left out of the rows so far, and why: reason -> how many.

    Args:
        path: The JSON file.
        images: The folder of its pictures.

    Raises:
        DataError: When it can't be read, or is in another form.
    """

    def __init__(self, path: Path, images: Path) -> None:
        self.path, self.images = path, images
        self.left_out: Counter[str] = Counter()
        content = _read(path)
        self._pictures: list[Mapping[str, Any]] = content["images"]
        self._names = {each["id"]: str(each["name"]) for each in content["categories"]}
        self._order = {key: place for place, key in enumerate(self._names)}
        self._annotations: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
        known = {picture["id"] for picture in self._pictures}
        for annotation in content["annotations"]:
            self._check(annotation, known)
            self._annotations[annotation["image_id"]].append(annotation)

    def _check(self, annotation: Mapping[str, Any], pictures: set[Any]) -> None:
        place = f"{self.path}: annotation {annotation.get('id')!r}"
        if annotation.get("image_id") not in pictures:
            raise DataError(
                f"{place} has image_id {annotation.get('image_id')!r}, expected that of one of the {len(pictures)} "
                "images. Remove it, or add the image."
            )
        if annotation.get("category_id") not in self._names:
            raise DataError(
                f"{place} has category_id {annotation.get('category_id')!r}, expected one of the {len(self._names)} "
                "categories. Remove it, or add the category."
            )
        box: Any = annotation.get("bbox")
        numbers = isinstance(box, list) and all(isinstance(each, (int, float)) for each in box)
        if not numbers or len(box) != 4 or not all(map(math.isfinite, box)):
            raise DataError(
                f"{place} has bbox {box!r:.80}, expected [left, top, width, height]. Fix or remove it."
            )

    def rows(self, task: str, *, folder: Path, question: str | None = None) -> Iterator[Row]:
        """The rows of one task.

        Args:
            task: A key of ``QUESTIONS``.
            folder: Where the rows will be; pictures inside it are named relative to it.
            question: Asked instead of the task's own; ``<ref-object>`` in it is the name.

        Yields:
            Rows in the official form, with ``objects``.

        Raises:
            DataError: When the question does not fit the task.
        """
        question = question or QUESTIONS[task]
        if (REF_MARK in question) == (task == "detect"):
            expected = "a question without" if task == "detect" else "one with"
            raise DataError(
                f"--question {question!r}: --task {task} expects {expected} {REF_MARK}, which stands for the name of "
                "what is asked for. Rewrite it."
            )
        for picture in self._pictures:
            path = self.images / str(picture["file_name"])
            size = self._size(picture, path)
            if size is None:
                continue
            inside = path.resolve().is_relative_to(folder.resolve())
            name = path.resolve().relative_to(folder.resolve()) if inside else path.resolve()
            objects, crowds = self._objects(picture["id"], size)
            asked = list(self._ask(task, question, objects, crowds, number=picture["id"]))
            for part, (turns, found) in enumerate(asked):
                yield {
                    "id": f"{picture['id']}" if len(asked) == 1 else f"{picture['id']}-{part}",
                    "image": name.as_posix(),
                    "conversations": turns,
                    "objects": found,
                }

    def _size(self, picture: Mapping[str, Any], path: Path) -> tuple[int, int] | None:
        """The picture's (width, height); None when it can't be used."""
        if not path.is_file():
            self.left_out["pictures that are not in the folder"] += 1
            return None
        try:
            size = ImageFile(str(path), ImageOptions(self.images, max_pixels=None)).size
        except RowError:
            self.left_out["pictures that can't be opened"] += 1
            return None
        said = picture.get("width"), picture.get("height")
        if None not in said and said != size:
            # Resized after the boxes were drawn, or turned by its EXIF orientation.
            self.left_out["pictures of another size than the file says"] += 1
            return None
        return size

    def _objects(self, picture: Any, size: tuple[int, int]) -> tuple[list[tuple[str, Box]], set[str]]:
        """A picture's objects in order, each a name and a box, and the names of its crowds."""
        found: list[tuple[int, Box, str]] = []
        crowds = set()
        for annotation in self._annotations.get(picture, ()):
            key = annotation["category_id"]
            name = str(annotation.get("caption") or self._names[key]).strip()
            if annotation.get("iscrowd"):
                self.left_out["crowds"] += 1
                crowds.add(name)
                continue
            left, top, width, height = annotation["bbox"]
            whole = (left, top, left + width, top + height)
            box = tuple(min(max(value, 0), size[place % 2]) for place, value in enumerate(whole))
            if box[2] <= box[0] or box[3] <= box[1]:
                self.left_out["boxes without area in their picture"] += 1
                continue
            found.append((self._order[key], (box[0], box[1], box[2], box[3]), name))
        found.sort(key=lambda each: each[:2])
        return [(name, box) for _, box, name in found], crowds

    def _ask(
        self, task: str, question: str, objects: Sequence[tuple[str, Box]], crowds: set[str], *, number: Any
    ) -> Iterator[tuple[list[Row], Row]]:
        """The conversations about one picture, each with its ``objects``."""
        if task == "detect":
            answer = "\n".join([REF_MARK + BOX_MARK] * len(objects)) or NOTHING_FOUND
            names = [name for name, _ in objects]
            yield _turns(question, answer), {"ref": names, "bbox": [list(box) for _, box in objects]}
            return
        by_name: dict[str, list[Box]] = defaultdict(list)
        for name, box in objects:
            by_name[name].append(box)
        if task == "count" and (absent := self._absent(by_name, crowds, number)) is not None:
            by_name[absent] = []  # a model that never reads 0 never says it
        for name, boxes in by_name.items():
            if name in crowds:
                self.left_out["names of crowds, in their picture"] += 1
                continue
            refs = [name] * question.count(REF_MARK)
            if task == "count":
                yield _turns(question, str(len(boxes))), {"ref": refs, "bbox": []}
            else:
                answer = BOX_MARK * len(boxes)
                yield _turns(question, answer), {"ref": refs, "bbox": [list(box) for box in boxes]}

    def _absent(self, present: Mapping[str, Any], crowds: set[str], number: Any) -> str | None:
        """A category that a picture does not show, another one for every picture."""
        names = [name for name in self._names.values() if name not in present and name not in crowds]
        return names[hash(number) % len(names)] if names and isinstance(number, int) else None


def _turns(question: str, answer: str) -> list[Row]:
    return [{"role": "user", "content": f"<image>\n{question}"}, {"role": "assistant", "content": answer}]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"{path}: it can't be read ({error.strerror}). Name COCO's annotation file."
        ) from error
    except ValueError as error:
        raise DataError(
            f"{path}: no JSON ({error}), expected COCO's annotations. Name the right file."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in _KEYS):
        found = ", ".join(content) if isinstance(content, dict) else type(content).__name__
        raise DataError(
            f"{path}: found {found[:200] or 'nothing'}, expected an object with the lists {', '.join(_KEYS)}, as in "
            "instances_train2017.json. Name COCO's annotation file."
        )
    for key, wanted in {"images": ("id", "file_name"), "categories": ("id", "name")}.items():
        for place, each in enumerate(content[key]):
            missing = [name for name in wanted if not isinstance(each, dict) or each.get(name) is None]
            if missing:
                raise DataError(f"{path}: {key}[{place}] has no {missing[0]!r}, expected one. Add it.")
    for place, each in enumerate(content["annotations"]):
        if not isinstance(each, dict):
            raise DataError(f"{path}: annotations[{place}] is no object. Remove it.")
    return content
