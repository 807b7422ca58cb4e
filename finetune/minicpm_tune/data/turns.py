"""What a conversation is once it is read: turns made of text and media.

Every file format ends here (``data/row_parsing.py``), and every prompt starts here (``data/prompts.py``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Media:
    """The place of an image, a video or an audio in a text.

    Attributes:
        kind: ``image``, ``video`` or ``audio``.
        index: Its number among the conversation's media, counted in the order of the text.
    """

    kind: str
    index: int


@dataclass(frozen=True)
class Literal:
    """A control text such as ``<image>`` or ``<|im_end|>`` that is meant as plain text."""

    text: str


Part = str | Media | Literal


@dataclass(frozen=True)
class Turn:
    """One message.

    Attributes:
        role: ``system``, ``user`` or ``assistant``.
        parts: Its content in order.
        learn: Whether an assistant turn may be supervised.
        thoughts: What the assistant thinks before its answer, where the row gives it apart from the answer.
        literal: Whether every control text in it is plain text (``literal_control_tokens``).
    """

    role: str
    parts: tuple[Part, ...]
    learn: bool = True
    thoughts: str | None = field(default=None, repr=False)
    literal: bool = field(default=False, repr=False)

    @property
    def text(self) -> str:
        """The content without its media."""
        texts = (part.text if isinstance(part, Literal) else part for part in self.parts)
        return "".join(text for text in texts if isinstance(text, str))


def media_of(turns: Iterable[Turn]) -> list[Media]:
    """The media of all turns, in the order of the text."""
    return [part for turn in turns for part in turn.parts if isinstance(part, Media)]
