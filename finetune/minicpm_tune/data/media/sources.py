"""Where an image's bytes come from: a path, a data URI, bytes in the row, or an http(s) address."""

from __future__ import annotations

import base64
import binascii
import io
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np

from minicpm_tune.errors import RowError

_REMOTE_TIMEOUT_S = 20
_REMOTE_LIMIT_BYTES = 64 * 2**20
_END_BYTES = 2**16  # of a file, for its fingerprint


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
    value = _inner(value)
    if isinstance(value, (bytes, bytearray)):
        if not value:
            raise RowError(
                "image", "an image has 0 bytes, expected an encoded image. Add the image, or remove the row."
            )
        return
    if not isinstance(value, str) or not value.strip():
        raise RowError(
            "media",
            f"an image is {reprlib.repr(value):.80}, expected a path, data URI or bytes. Fix the row.",
        )
    if is_remote(value):
        if not allow_remote:
            raise RowError(
                "remote image",
                f"image {value!r:.120} is a web address, expected a file. Download it, or pass "
                "--allow_remote_images true.",
            )
    elif not value.startswith("data:"):
        check_file(value, folder, "image")


def check_file(value: str, folder: Path, word: str) -> Path:
    """See that a path in a row names a file with something in it, and give the file.

    Raises:
        RowError: When it does not; the message says where it was looked for.
    """
    try:
        path = find_file(value, folder)
        found = path.is_file()
        size = path.stat().st_size if found else 0
    except (OSError, ValueError) as error:  # a name too long, or with a null character
        raise RowError(
            f"missing {word}", f"{word} {value!r:.200} is no file name ({error}). Fix the path."
        ) from error
    if not found and path.is_dir():
        raise RowError(
            f"missing {word}",
            f"{word} {value!r:.200} is a folder ({str(path.absolute())!r:.300}), expected a file. Name the file in it.",
        )
    if not found:
        raise RowError(
            f"missing {word}",
            f"{word} {value!r:.200} not found (looked at {str(path.absolute())!r:.300}), expected a file. Fix the "
            "path, or say what it is relative to with --image_folder.",
        )
    if size == 0:
        raise RowError(
            word, f"{word} {str(path)!r:.300} has 0 bytes, expected a whole {word}. Replace the file."
        )
    return path


def open_bytes(value: Any, folder: Path, name: str) -> io.BytesIO | Path:
    """Give what ``Image.open`` takes for a source that ``check_source`` accepted."""
    value = _inner(value)
    if isinstance(value, (bytes, bytearray)):
        return io.BytesIO(value)
    if is_remote(value):
        return io.BytesIO(_fetch(value))
    if value.startswith("data:"):
        return io.BytesIO(decode_data_uri(value, name))
    return find_file(value, folder)


def fingerprint(value: Any, folder: Path) -> bytes:
    """What tells an image, a video or an audio from others, without decoding it and wherever it lies.

    Returns:
        Its size and both its ends; the text of a web address, and of a path that is no file.

    Raises:
        RowError: When a data URI can't be read.
    """
    if isinstance(value, Mapping) and value.get("array") is not None:
        content: Any = np.asarray(value["array"], dtype=np.float32).tobytes()
    else:
        value = _inner(value)
        if not isinstance(value, (str, bytes, bytearray)) or is_remote(value):
            return repr(value).encode()
        content = open_bytes(value, folder, "(data URI)")
        if isinstance(content, Path):
            if not content.is_file():
                return value.encode() if isinstance(value, str) else bytes(value)
            with content.open("rb") as file:
                start = file.read(_END_BYTES)
                size = file.seek(0, os.SEEK_END)
                file.seek(max(size - _END_BYTES, 0))
                return b"%d %b%b" % (size, start, file.read())
        content = content.getvalue()
    return b"%d %b%b" % (len(content), content[:_END_BYTES], content[-_END_BYTES:])


def describe(value: Any) -> str:
    """A source in a few words, for messages."""
    if isinstance(value, Mapping):
        value = value.get("path") or value.get("bytes")
    if isinstance(value, (bytes, bytearray)):
        return f"({len(value)} bytes)"
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:100]}... ({len(text)} characters)"


def _inner(value: Any) -> Any:
    """The bytes or the path of a {bytes, path} pair, as Hugging Face data sets store images, or of a {url}."""
    if not isinstance(value, Mapping):
        return value
    data = value.get("bytes")
    return (value.get("path") or value.get("url")) if data is None else data


def decode_data_uri(value: str, name: str) -> bytes:
    """The bytes of a ``data:...;base64,...`` address.

    Raises:
        RowError: When it is no base64.
    """
    header, _, body = value.partition(",")
    try:
        if not header.endswith(";base64"):
            raise ValueError("it is not marked ';base64,'")
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        kind = header.removeprefix("data:").partition("/")[0]
        word = kind if kind in ("video", "audio") else "image"
        raise RowError(
            word, f"{word} {name}: {error}, expected 'data:{word}/...;base64,...'. Encode it again."
        ) from error


def _fetch(address: str) -> bytes:
    request = Request(address, headers={"User-Agent": "minicpm-v-finetune"})
    try:
        with urlopen(request, timeout=_REMOTE_TIMEOUT_S) as answer:
            data = answer.read(_REMOTE_LIMIT_BYTES + 1)
    except (OSError, ValueError) as error:
        raise RowError(
            "image",
            f"image {address!r:.120} can't be fetched ({error}), expected an answer. Download it once "
            "instead.",
        ) from error
    if len(data) > _REMOTE_LIMIT_BYTES:
        raise RowError(
            "image",
            f"image {address!r:.120} is over {_REMOTE_LIMIT_BYTES} bytes. Download it and make it smaller.",
        )
    return data
