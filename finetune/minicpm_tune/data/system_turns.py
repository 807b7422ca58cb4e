"""System turns for MiniCPM-V 2.0, whose prompt has no form for them."""

from __future__ import annotations

from collections.abc import Sequence

from minicpm_tune.data.turns import Media, Part, Turn


def system_into_user(turns: Sequence[Turn]) -> list[Turn]:
    """Put a system turn in front of the first user text, behind the images that the turn starts with.

    V-2 has no system form; its inference always writes the image first.
    """
    if not turns or turns[0].role != "system":
        return list(turns)
    system, first, *rest = turns
    parts = list(first.parts)
    position = 0
    for index, part in enumerate(parts):
        if isinstance(part, Media):
            position = index + 1
        elif part.strip():
            break
    leading = parts[:position]
    text: list[Part] = list(parts[position:])
    if leading and text and isinstance(text[0], str):
        text[0] = text[0].removeprefix("\n")
    joined = [*leading, "\n"] if leading else []
    return [Turn("user", (*joined, *system.parts, "\n", *text)), *rest]
