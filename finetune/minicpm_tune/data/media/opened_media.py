"""An image or a video of a row, opened but not yet decoded.

Layouts, and with them the whole text side of a sample, need only sizes; those stand in the file's first
bytes. The pixels are decoded when a sample is known to be used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate

from PIL import Image


@dataclass(frozen=True)
class Picture:
    """What a placeholder stands for.

    Attributes:
        kind: ``image`` or ``video``.
        sizes: (width, height) of every frame, in pixels; an image has one.
        frames: Decodes the frames, in mode RGB.
        packs: For generations that pack video frames: the time index of every frame, pack by pack.
        digest: Digest of everything its pixels depend on, without decoding it; None for videos.
    """

    kind: str
    sizes: tuple[tuple[int, int], ...]
    frames: Callable[[], Iterable[Image.Image]]
    packs: tuple[tuple[int, ...], ...] | None = None
    digest: Callable[[], bytes] | None = None

    @classmethod
    def of(cls, image: Image.Image) -> Picture:
        """A picture of an image that is decoded already, in mode RGB."""
        return cls("image", (image.size,), lambda: [image])

    @property
    def pack_starts(self) -> list[int]:
        """The first frame of every pack; every frame where frames are not packed."""
        if self.packs is None:
            return list(range(len(self.sizes)))
        return [0, *accumulate(len(pack) for pack in self.packs[:-1])]
