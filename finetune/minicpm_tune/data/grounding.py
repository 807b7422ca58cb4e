"""Names and boxes in texts: written as the models were trained on them, read out of answers, drawn on pictures.

MiniCPM-V writes a name as ``<ref>the dog</ref>``, a box as ``<box>x1 y1 x2 y2</box>`` and a point as
``<point>x y</point>``, in whole numbers from 0 to 1000 of the picture's width and height. InternLM-XComposer2 has no
such tokens: a name stands as it is, a box as ``[x1, y1, x2, y2]``. ``Generation.box_form`` says which.

Source: the makers' answers in OpenBMB/MiniCPM-V issues 185, 772, 982 and InternLM-XComposer issue 167 (no tokens for
boxes). The scale of XComposer2 is the one that users report in its issue 319.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

from minicpm_tune.data.objects import SCALE, Box, Numbers, Ref, Size, Tag
from minicpm_tune.data.turns import Part, Turn

_TAGS = re.compile(r"<ref>(?P<ref>.*?)</ref>|<(?P<tag>box|point)>(?P<inside>[^<>]*)</(?P=tag)>", re.DOTALL)
_BRACKETS = re.compile(r"\[(?P<inside>\s*\d+\s*(?:,\s*\d+\s*){1,3})\]")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_PENS = ("red", "blue", "lime", "magenta", "orange", "cyan")


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
