"""Names and boxes of a row: from pixels to the text that the models were trained on, and back.

A row lists them in ``objects``, ``{"ref": ["the dog"], "bbox": [[10, 20, 50, 60]]}``, and marks their places in its
texts with ``<ref-object>`` and ``<bbox>``, as ms-swift does.

MiniCPM-V writes a name as ``<ref>the dog</ref>``, a box as ``<box>x1 y1 x2 y2</box>`` and a point as
``<point>x y</point>``, in whole numbers from 0 to 1000 of the picture's width and height. InternLM-XComposer2 has no
such tokens: a name stands as it is, a box as ``[x1, y1, x2, y2]``. ``Generation.box_form`` says which.

Source: the makers' answers in OpenBMB/MiniCPM-V issues 185, 772, 982 and InternLM-XComposer issue 167 (no tokens for
boxes). The scale of XComposer2 is the one that users report in its issue 319.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw

from minicpm_tune.data.row_keys import NOTHING
from minicpm_tune.errors import RowError

if TYPE_CHECKING:
    from minicpm_tune.data.turns import Part, Turn

SCALE = 1000
REF_MARK, BOX_MARK = "<ref-object>", "<bbox>"
_KEY_OF = {REF_MARK: "ref", BOX_MARK: "bbox"}
BOX_TYPES = ("real", "norm1", "norm1000")
_KEYS = ("ref", "bbox", "bbox_type", "image_id")
_SLACK = 1e-6  # of the picture's side: what dividing and multiplying floats can add
_EXAMPLE = '{"ref": ["the dog"], "bbox": [[10, 20, 50, 60]]}'
_KIND = "boxes"
_TAGS = re.compile(r"<ref>(?P<ref>.*?)</ref>|<(?P<tag>box|point)>(?P<inside>[^<>]*)</(?P=tag)>", re.DOTALL)
_BRACKETS = re.compile(r"\[(?P<inside>\s*\d+\s*(?:,\s*\d+\s*){1,3})\]")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_PENS = ("red", "blue", "lime", "magenta", "orange", "cyan")

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


@dataclass(frozen=True)
class NamedBox:
    """A box or point that stands in a text.

    Attributes:
        name: The name in front of it, or "".
        values: (x1, y1, x2, y2) or (x, y), from 0 to 1000.
    """

    name: str
    values: Numbers


# (label, x1, y1, x2, y2) in pixels; of a point x1 = x2 and y1 = y2.
PixelBox = tuple[str, float, float, float, float]


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


# --- to text ---


def write_objects(turns: Iterable[Turn], sizes: Sequence[Size | None], form: str) -> list[Turn]:
    """Write the names and boxes of a conversation as the model was trained to read them.

    Args:
        turns: The conversation.
        sizes: (width, height) of each image among its media, in pixels, as the model is given it; None for others.
        form: ``Generation.box_form``.

    Returns:
        The conversation without ``Ref`` and ``Box``; texts that touch are joined.

    Raises:
        RowError: When a box does not fit its picture.
    """
    written = []
    for turn in turns:
        if any(isinstance(part, (Ref, Box)) for part in turn.parts):
            parts: list[Part] = []
            for part in turn.parts:
                for each in _written(part, sizes, form):
                    # In a literal turn the tags must stay apart from texts that only look like them.
                    each = each.text if isinstance(each, Tag) and not turn.literal else each
                    if isinstance(each, str) and parts and isinstance(parts[-1], str):
                        parts[-1] += each
                    else:
                        parts.append(each)
            turn = replace(turn, parts=tuple(parts))
        written.append(turn)
    return written


def _written(part: Part, sizes: Sequence[Size | None], form: str) -> Iterator[Part]:
    if isinstance(part, Ref):
        yield from (Tag("<ref>"), part.name, Tag("</ref>")) if form == "tags" else (part.name,)
    elif isinstance(part, Box):
        size = sizes[part.image]
        assert size is not None, part
        values = [str(value) for value in part.scaled(size)]
        tag = "box" if len(values) == 4 else "point"
        yield Tag(f"<{tag}>{' '.join(values)}</{tag}>") if form == "tags" else f"[{', '.join(values)}]"
    else:
        yield part


# --- from text ---


def read_boxes(text: str, form: str = "tags") -> list[NamedBox]:
    """The boxes and points that stand in a text, each with the name in front of it.

    Args:
        text: An answer, say.
        form: ``Generation.box_form``.

    Example:
        >>> [box.values for box in read_boxes("<ref>dog</ref><box>10 20 500 600</box> and <point>7 8</point>")]
        [(10.0, 20.0, 500.0, 600.0), (7.0, 8.0)]
        >>> read_boxes("The dog is at [10, 20, 500, 600].", "brackets")
        [NamedBox(name='', values=(10.0, 20.0, 500.0, 600.0))]
    """
    return list(_boxes(text, form, [""]))


def _boxes(text: str, form: str, name: list[str]) -> Iterator[NamedBox]:
    """The boxes of a text; ``name`` holds the last name, across texts."""
    for found in (_TAGS if form == "tags" else _BRACKETS).finditer(text):
        groups = found.groupdict()
        if groups.get("ref") is not None:
            name[0] = groups["ref"].strip()
            continue
        values = tuple(map(float, _NUMBER.findall(groups["inside"])))
        expected = {"box": (4,), "point": (2,)}.get(groups.get("tag") or "", (2, 4))
        if len(values) in expected:
            yield NamedBox(name[0], values)


def boxes_in_pixels(
    turns: Iterable[Turn], sizes: Sequence[Size | None], form: str = "tags"
) -> list[list[PixelBox]]:
    """The boxes of a conversation, by picture: those of its ``objects``, and those that its texts hold.

    Boxes in texts belong to a picture only where the conversation has a single one.

    Args:
        turns: The conversation, as it was read.
        sizes: (width, height) of each image among its media; None for others.
        form: ``Generation.box_form``.

    Returns:
        For every medium its boxes, in pixels.
    """
    found: list[list[PixelBox]] = [[] for _ in sizes]
    pictures = [(index, size) for index, size in enumerate(sizes) if size is not None]
    name = [""]
    for part in (part for turn in turns for part in turn.parts):
        if isinstance(part, Ref):
            name[0] = part.name
        elif isinstance(part, Box):
            picture = sizes[part.image]
            assert picture is not None, part
            box = NamedBox(name[0], tuple(map(float, part.scaled(picture))))
            found[part.image].append(_pixel_box(box, picture))
        elif isinstance(part, str) and len(pictures) == 1:
            [(index, size)] = pictures
            found[index] += [_pixel_box(box, size) for box in _boxes(part, form, name)]
    return found


def pixel_boxes(text: str, size: Size, form: str = "tags") -> list[PixelBox]:
    """The boxes of a text, in pixels of a picture of (width, height).

    Example:
        >>> pixel_boxes("<ref>dog</ref><box>100 200 500 600</box>", (640, 480))
        [('dog', 64.0, 96.0, 320.0, 288.0)]
    """
    return [_pixel_box(box, size) for box in read_boxes(text, form)]


def _pixel_box(box: NamedBox, size: Size) -> PixelBox:
    values = [value * size[place % 2] / SCALE for place, value in enumerate(box.values)]
    return box.name, values[0], values[1], values[-2], values[-1]


def draw_boxes(image: Image.Image, boxes: Iterable[PixelBox]) -> Image.Image:
    """A copy of a picture with boxes and points drawn on it; each name has a color of its own."""
    drawn = image.convert("RGB")
    pencil = ImageDraw.Draw(drawn)
    width = max(1, round(max(image.size) / 300))
    pens: dict[str, str] = {}
    for label, x1, y1, x2, y2 in boxes:
        pen = pens.setdefault(label, _PENS[len(pens) % len(_PENS)])
        if (x1, y1) == (x2, y2):
            pencil.circle((x1, y1), 4 * width, outline=pen, width=width)
        else:
            # a text may hold corners in any order, which Pillow refuses
            corners = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
            pencil.rectangle(corners, outline=pen, width=width)
        if label:
            pencil.text((min(x1, x2) + 2 * width, min(y1, y2) + width), label, fill=pen)
    return drawn


def intersection_over_union(first: Numbers, second: Numbers) -> float:
    """How much two boxes (x1, y1, x2, y2) overlap, from 0 to 1.

    Example:
        >>> intersection_over_union((0, 0, 2, 2), (1, 0, 3, 2))
        0.3333333333333333
    """
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(width, 0) * max(height, 0)
    both = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)) - shared
    return shared / both if both > 0 else 0.0
