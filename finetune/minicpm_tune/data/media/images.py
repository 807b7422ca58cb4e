"""Opening images as the released inference does.

The released code of every generation opens a file with ``Image.open(path).convert("RGB")``: the first frame
of an animation, an alpha channel dropped, a palette and CMYK converted by Pillow, 16-bit gray clipped. The
one difference is the EXIF orientation: MiniCPM-V 2.0 to 4.5 ignore it, transformers (4.6, 4.7) turns the
image upright (``transformers.image_utils.load_image``). ``ImageOptions.upright`` says which.
"""

from __future__ import annotations

import hashlib
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.data.media.audio import Clip
from minicpm_tune.data.media.sources import check_source, describe, open_bytes
from minicpm_tune.errors import RowError
from minicpm_tune.settings.data_arguments import DEFAULT_MAX_PIXELS, DataArguments

# Pillow's own limit is a module-wide variable; ours is an option and names the image.
Image.MAX_IMAGE_PIXELS = None
# What Pillow and its decoders raise on damaged files (found by tests/data/test_samples_fuzz.py).
_DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, LookupError, TypeError, ArithmeticError, EOFError, MemoryError,
    AttributeError, RuntimeError, struct.error, zlib.error,
)  # fmt: skip
_QUARTER_TURNS = (5, 6, 7, 8)  # EXIF orientations that swap width and height


@dataclass(frozen=True)
class ImageOptions:
    """How images are found and opened.

    Attributes:
        folder: What relative paths are relative to.
        upright: Whether the EXIF orientation is applied.
        allow_remote: Whether http(s) addresses are fetched.
        max_pixels: Most pixels an image may have; ``None`` for no limit.
    """

    folder: Path
    upright: bool = False
    allow_remote: bool = False
    max_pixels: int | None = DEFAULT_MAX_PIXELS

    @classmethod
    def of(cls, arguments: DataArguments, generation: Generation, *, folder: Path) -> ImageOptions:
        """The user's options, for rows of a data file in ``folder``."""
        upright = {"apply": True, "ignore": False}.get(arguments.exif_orientation, generation.upright_images)
        return cls(
            Path(arguments.image_folder).expanduser() if arguments.image_folder else folder,
            upright=upright,
            allow_remote=arguments.allow_remote_images,
            max_pixels=arguments.max_image_pixels or None,
        )


class ImageFile:
    """An image whose header has been read.

    Args:
        value: The source, as the row has it: a path, http(s) address, data URI, bytes, or {bytes, path}.
        options: How it is found and opened.

    Raises:
        RowError: When it is not there, or no image; the message names it.
    """

    def __init__(self, value: Any, options: ImageOptions) -> None:
        check_source(value, options.folder, allow_remote=options.allow_remote)
        self.name = describe(value)
        self.options = options
        data = self._data = open_bytes(value, options.folder, self.name)
        self._image = _guarded(self.name, lambda: Image.open(data, formats=_formats()))
        width, height = self._image.size
        if options.max_pixels is not None and width * height > options.max_pixels:
            self._image.close()
            raise RowError(
                "image",
                f"image {self.name} has {width} x {height} pixels, expected at most {options.max_pixels}. Make it "
                "smaller, or raise --max_image_pixels.",
            )
        exif = _guarded(self.name, self._image.getexif) if options.upright else {}
        turned = exif.get(ExifTags.Base.Orientation) in _QUARTER_TURNS
        self.size = (height, width) if turned else (width, height)

    def digest(self) -> bytes:
        """Digest of the encoded image and of how it is decoded."""
        read = self._data.read_bytes if isinstance(self._data, Path) else self._data.getvalue
        person = b"upright" if self.options.upright else b""
        return hashlib.blake2b(_guarded(self.name, read), digest_size=32, person=person).digest()

    def decode(self) -> Image.Image:
        """Decode the image, in mode RGB; may be called once."""
        image = _guarded(self.name, self._decode)
        if image.size != self.size:
            raise RowError(
                "image",
                f"image {self.name} is {image.size} when decoded, expected {self.size} as its header says. "
                "Save it again.",
            )
        return image

    def _decode(self) -> Image.Image:
        with self._image as image:
            image.load()
            if self.options.upright:
                ImageOps.exif_transpose(image, in_place=True)
            # convert() would copy an image that is RGB already, a tenth of the time of decoding it
            return image if image.mode == "RGB" else image.convert("RGB")


def open_image(value: Any, options: ImageOptions) -> Picture:
    """Open an image for a sample; it is decoded when its frames are asked for.

    Args:
        value: The source, as the row has it.
        options: How it is found and opened.

    Returns:
        The picture.

    Raises:
        RowError: When it is not there, or no image; decoding may raise it, too.
    """
    file = ImageFile(value, options)
    return Picture("image", (file.size,), lambda: [file.decode()], digest=file.digest)


@cache
def _formats() -> tuple[str, ...]:
    """Every format that Pillow decodes by itself: for EPS it starts Ghostscript, which runs what the file says."""
    Image.init()
    return tuple(name for name in Image.ID if name != "EPS")


def _guarded(name: str, action: Any) -> Any:
    """Run one step of Pillow's, and turn its errors into a ``RowError`` that names the image."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # notes on odd but readable files
            return action()
    except UnidentifiedImageError as error:
        raise RowError(
            "image",
            f"image {name} is in no format that Pillow knows, expected JPEG, PNG or the like. Replace it.",
        ) from error
    except _DECODE_ERRORS as error:
        raise RowError(
            "image",
            f"image {name} can't be decoded ({str(error) or type(error).__name__}), expected a whole image. "
            "Replace it.",
        ) from error


@dataclass(frozen=True)
class Picture:
    """What a placeholder stands for.

    Attributes:
        kind: ``image`` or ``video``.
        sizes: (width, height) of every frame, in pixels; an image has one.
        frames: Decodes the frames, in mode RGB.
        packs: For generations that pack video frames: the time index of every frame, pack by pack.
        digest: Digest of everything its pixels depend on, without decoding it; None for videos.
        seconds: How long a video is; 0 for an image.
        sound: What is heard after each frame, for a video with its sound.
    """

    kind: str
    sizes: tuple[tuple[int, int], ...]
    frames: Callable[[], Iterable[Image.Image]]
    packs: Sequence[Sequence[int]] | None = None
    digest: Callable[[], bytes] | None = None
    seconds: float = 0.0
    sound: tuple[Clip, ...] = ()

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
