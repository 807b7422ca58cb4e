"""The names and boxes of a row: ``objects``, and the marks in its texts that they stand for.

A row lists them in ``objects``, ``{"ref": ["the dog"], "bbox": [[10, 20, 50, 60]]}``, and marks their places in its
texts with ``<ref-object>`` and ``<bbox>``, as ms-swift does. ``grounding.py`` writes them as the models read them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minicpm_tune.data.row_keys import NOTHING
from minicpm_tune.errors import RowError

SCALE = 1000
REF_MARK, BOX_MARK = "<ref-object>", "<bbox>"
_KEY_OF = {REF_MARK: "ref", BOX_MARK: "bbox"}
BOX_TYPES = ("real", "norm1", "norm1000")
_KEYS = ("ref", "bbox", "bbox_type", "image_id")
_SLACK = 1e-6  # of the picture's side: what dividing and multiplying floats can add
_EXAMPLE = '{"ref": ["the dog"], "bbox": [[10, 20, 50, 60]]}'
_KIND = "boxes"

Numbers = tuple[float, ...]
Size = tuple[int, int]


@dataclass(frozen=True)
class Ref:
    """A name that stands for a ``<ref-object>``."""

    name: str
    text = REF_MARK


@dataclass(frozen=True)
class Box:
    """A box or point that stands for a ``<bbox>``.

    Attributes:
        number: Its number in ``objects.bbox``.
        values: (x1, y1, x2, y2) or (x, y), as the row has them.
        unit: ``real`` (pixels of the picture), ``norm1`` (0 to 1) or ``norm1000`` (0 to 1000).
        image: Its picture: a number among the row's images, and once the row is read, among its media.
    """

    number: int
    values: Numbers
    unit: str
    image: int
    text = BOX_MARK

    def scaled(self, size: Size) -> tuple[int, ...]:
        """Its values in whole numbers from 0 to 1000.

        Args:
            size: (width, height) of its picture, in pixels, as the model is given it.

        Raises:
            RowError: When it does not fit the picture.
        """
        limits = {"real": size, "norm1": (1, 1), "norm1000": (SCALE, SCALE)}[self.unit]
        shares = [value / limits[place % 2] for place, value in enumerate(self.values)]
        if not all(-_SLACK <= share <= 1 + _SLACK for share in shares):
            raise RowError(
                _KIND,
                f"objects.bbox {self.number} is {list(self.values)}, expected 0 to {limits[0]} across and 0 to "
                f"{limits[1]} down (bbox_type {self.unit!r}; its picture has {size[0]} x {size[1]} pixels). Fix the "
                "box, or its bbox_type.",
            )
        if len(shares) == 4 and (shares[2] <= shares[0] or shares[3] <= shares[1]):
            raise RowError(
                _KIND,
                f"objects.bbox {self.number} is {list(self.values)}, expected [left, top, right, bottom] with left "
                "below right and top below bottom. Fix the order, or remove a box without area.",
            )
        return tuple(min(max(round(share * SCALE), 0), SCALE) for share in shares)


@dataclass(frozen=True)
class Tag:
    """A text in which control texts are the tokens themselves, also where the row's other texts are literal."""

    text: str


class Objects:
    """A row's ``objects``, given to its marks in the order of the text.

    Args:
        value: What the row has under ``objects``; None or empty for none.

    Raises:
        RowError: When it is in another form; the message shows the right one.
    """

    def __init__(self, value: Any) -> None:
        value = {} if value in NOTHING else value
        if not isinstance(value, Mapping):
            raise RowError(_KIND, f"objects is {value!r:.80}, expected {_EXAMPLE}. Rewrite it.")
        if unknown := [key for key in value if key not in _KEYS]:
            raise RowError(
                _KIND,
                f"objects has the key {unknown[0]!r}, expected {', '.join(_KEYS)}. Rename or remove it.",
            )
        refs, boxes = _read_refs(value.get("ref")), _read_boxes(value)
        self.values: dict[str, list[Ref] | list[Box]] = {REF_MARK: refs, BOX_MARK: boxes}
        self.taken = dict.fromkeys(self.values, 0)

    def __bool__(self) -> bool:
        return any(self.values.values())

    def holds(self, mark: str) -> bool:
        """Whether something is left for a mark."""
        return self.taken[mark] < len(self.values[mark])

    def take(self, mark: str, number: int) -> Ref | Box:
        """What a mark in turn ``number`` stands for."""
        index, values = self.taken[mark], self.values[mark]
        if index >= len(values):
            raise RowError(
                _KIND,
                f"turn {number} has {mark} number {index + 1}, but the row's objects.{_KEY_OF[mark]} has {len(values)} "
                f"items, expected one for each {mark}, such as {_EXAMPLE}. Add what is missing or remove the mark; if "
                "it is meant as text, put a backslash in front of it.",
            )
        self.taken[mark] = index + 1
        return values[index]

    def check_all_taken(self) -> None:
        """See that there is a mark for everything.

        Raises:
            RowError: With the numbers.
        """
        for mark, values in self.values.items():
            if self.taken[mark] < len(values):
                raise RowError(
                    _KIND,
                    f"objects.{_KEY_OF[mark]} has {len(values)} items, but the texts have {self.taken[mark]} {mark}, "
                    f"expected as many. Write {mark} where each of them belongs, or remove the others.",
                )


def _read_refs(refs: Any) -> list[Ref]:
    refs = [] if refs is None else refs
    if not isinstance(refs, (list, tuple)) or not all(isinstance(ref, str) and ref.strip() for ref in refs):
        raise RowError(_KIND, f"objects.ref is {refs!r:.80}, expected a list of names. Fix it.")
    for ref in refs:
        if re.search(r"</?(?:ref|box|point|quad)>|<bbox>|<ref-object>", ref):
            raise RowError(
                _KIND,
                f"objects.ref has {ref!r:.80}, expected a name without tags. Remove them; they are written here.",
            )
    return [Ref(ref) for ref in refs]


def _read_boxes(objects: Mapping[str, Any]) -> list[Box]:
    boxes = [] if objects.get("bbox") is None else objects["bbox"]
    if not isinstance(boxes, (list, tuple)):
        raise RowError(_KIND, f"objects.bbox is {boxes!r:.80}, expected a list of boxes. Fix it.")
    for number, box in enumerate(boxes):
        if not _is_box(box):
            raise RowError(
                _KIND,
                f"objects.bbox {number} is {box!r:.80}, expected [x1, y1, x2, y2] or [x, y] in finite numbers. Fix it.",
            )
    unit = objects.get("bbox_type") or "real"
    if unit not in BOX_TYPES:
        raise RowError(
            _KIND, f"objects.bbox_type is {unit!r:.80}, expected one of {', '.join(BOX_TYPES)}. Fix it."
        )
    images = objects.get("image_id") or [0] * len(boxes)
    numbers = isinstance(images, (list, tuple)) and all(type(each) is int and each >= 0 for each in images)
    if not numbers or len(images) != len(boxes):
        raise RowError(
            _KIND,
            f"objects.image_id is {images!r:.80}, expected a list of {len(boxes)} numbers, one for each box, counted "
            "from 0. Fix it, or leave it out where all boxes are of the first image.",
        )
    return [Box(n, tuple(box), unit, image) for n, (box, image) in enumerate(zip(boxes, images, strict=True))]


def _is_box(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) not in (2, 4):
        return False
    return all(
        isinstance(each, (int, float)) and not isinstance(each, bool) and math.isfinite(each)
        for each in value
    )
