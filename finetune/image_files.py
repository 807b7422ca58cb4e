"""Opening images as the released inference does.

The released code of every generation opens a file with ``Image.open(path).convert("RGB")``: the first frame
of an animation, an alpha channel dropped, a palette and CMYK converted by Pillow, 16-bit grey clipped. The one
difference is the EXIF orientation: MiniCPM-V 2.0 to 4.5 ignore it, transformers (4.6, 4.7) turns the image
upright (``transformers.image_utils.load_image``). ``exif`` says which.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from records import RowError

# What Pillow raises on damaged files: its own errors, and those its decoders let through.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, IndexError, TypeError, ZeroDivisionError, EOFError,
                  OverflowError, MemoryError, KeyError, AttributeError)  # fmt: skip
_REMOTE_TIMEOUT_S = 20
_REMOTE_LIMIT_BYTES = 64 * 2**20


def is_remote(value: Any) -> bool:
    """Whether an image's source is an http(s) address."""
    return isinstance(value, str) and value.lower().startswith(("http://", "https://"))


def find_file(value: str, folder: Path) -> Path:
    """The file that a path in a row means: absolute, relative to ``folder``, or to the current folder."""
    path = Path(os.path.expanduser(value.removeprefix("file://")))
    if path.is_absolute() or (folder / path).exists() or not path.exists():
        return folder / path
    return path


def check_source(value: Any, folder: Path, *, allow_remote: bool = False) -> None:
    """See that an image's source can exist, without reading it.

    Args:
        value: The source, as the row has it.
        folder: What relative paths are relative to.
        allow_remote: Whether http(s) addresses are allowed.

    Raises:
        RowError: When it is not a file, not an accepted form, or a refused address.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, (bytes, bytearray)):
        if not value:
            raise RowError("image", "an image has 0 bytes, expected an encoded image. Remove the row or add the image.")
        return
    if not isinstance(value, str) or not value:
        raise RowError("media", f"an image is {value!r:.80}, expected a path, data URI or bytes. Fix the row.")
    if is_remote(value):
        if not allow_remote:
            raise RowError(
                "remote",
                f"image {value!r:.120} is a web address, expected a file. Download it, or pass "
                "--allow_remote_images true.",
            )
        return
    if value.startswith("data:"):
        return
    path = find_file(value, folder)
    try:
        size = path.stat().st_size
        found = path.is_file()
    except (OSError, ValueError):
        size, found = 0, False
    if not found:
        raise RowError(
            "missing image",
            f"image {value!r:.200} not found (looked at {str(path)!r:.300}), expected a file. Fix the path, or say "
            "what it is relative to with --image_folder.",
        )
    if size == 0:
        raise RowError("image", f"image {str(path)!r} has 0 bytes, expected an image. Replace the file.")


def open_image(
    value: Any, folder: Path, *, upright: bool = False, allow_remote: bool = False, max_pixels: int | None = None
) -> Image.Image:
    """Open and decode an image.

    Args:
        value: The source, as the row has it: a path, http(s) address, data URI, bytes, or {bytes, path}.
        folder: What relative paths are relative to.
        upright: Whether the EXIF orientation is applied.
        allow_remote: Whether http(s) addresses are fetched.
        max_pixels: Most pixels an image may have; ``None`` for no limit.

    Returns:
        The decoded image, in mode RGB.

    Raises:
        RowError: When it can't be read; the message names the image.
    """
    check_source(value, folder, allow_remote=allow_remote)
    name = describe(value)
    data = _data_of(value, folder, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's notes on odd but readable files
            with Image.open(data) as image:
                _check_pixels(image, name, max_pixels)
                image.load()
                if upright:
                    image = ImageOps.exif_transpose(image)
                return image.convert("RGB")
    except RowError:
        raise
    except UnidentifiedImageError as error:
        raise RowError(
            "image", f"image {name} is in no image format that Pillow knows, expected JPEG, PNG or the like. Replace it."
        ) from error
    except _DECODE_ERRORS as error:
        raise RowError(
            "image", f"image {name} can't be decoded ({error or type(error).__name__}), expected a whole image. Replace it."
        ) from error


def _check_pixels(image: Image.Image, name: str, max_pixels: int | None) -> None:
    width, height = image.size
    if max_pixels is not None and width * height > max_pixels:
        raise RowError(
            "image",
            f"image {name} has {width} x {height} pixels, expected at most {max_pixels}. Make it smaller, or raise "
            "--max_image_pixels.",
        )


def _data_of(value: Any, folder: Path, name: str) -> Any:
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, (bytes, bytearray)):
        return io.BytesIO(value)
    if is_remote(value):
        return io.BytesIO(_fetch(value))
    if value.startswith("data:"):
        return io.BytesIO(_data_uri(value, name))
    return find_file(value, folder)


def _data_uri(value: str, name: str) -> bytes:
    header, _, body = value.partition(",")
    try:
        if not header.endswith(";base64"):
            raise ValueError("it is not marked ';base64,'")
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowError("image", f"image {name}: {error}, expected 'data:image/...;base64,...'. Encode it again.") from error


def _fetch(address: str) -> bytes:
    request = Request(address, headers={"User-Agent": "minicpm-v-finetune"})
    try:
        with urlopen(request, timeout=_REMOTE_TIMEOUT_S) as answer:
            data = answer.read(_REMOTE_LIMIT_BYTES + 1)
    except (OSError, ValueError) as error:
        raise RowError("image", f"image {address!r:.120} can't be fetched ({error}). Download it once instead.") from error
    if len(data) > _REMOTE_LIMIT_BYTES:
        raise RowError("image", f"image {address!r:.120} is over {_REMOTE_LIMIT_BYTES} bytes. Download it instead.")
    return data


def describe(value: Any) -> str:
    """A source in a few words, for messages."""
    if isinstance(value, Mapping):
        value = value.get("path") or value.get("bytes")
    if isinstance(value, (bytes, bytearray)):
        return f"({len(value)} bytes)"
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:100]}... ({len(text)} characters)"
