"""What a conversation is once it is read: turns made of text and media.

Every file format ends here (``data/row_parsing.py``), and every prompt starts here (``data/prompts.py``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Media:
    """The place of an image or a video in a text.

    Attributes:
        kind: ``image`` or ``video``.
        index: Its number among the conversation's media, counted in the order of the text.
    """

    kind: str
    index: int


Part = str | Media


@dataclass(frozen=True)
class Turn:
    """One message.

    Attributes:
        role: ``system``, ``user`` or ``assistant``.
        parts: Its content in order.
        learn: Whether an assistant turn may be supervised.
    """

    role: str
    parts: tuple[Part, ...]
    learn: bool = True

    @property
    def text(self) -> str:
        """The content without its media."""
        return "".join(part for part in self.parts if isinstance(part, str))


def media_of(turns: Iterable[Turn]) -> list[Media]:
    """The media of all turns, in the order of the text."""
    return [part for turn in turns for part in turn.parts if isinstance(part, Media)]
