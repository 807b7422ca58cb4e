"""Reports as single HTML files: style, script and data stand in the file, and it asks for nothing from outside.

The templates escape every value by themselves (Jinja2's autoescape). The Content-Security-Policy in the page names
the one script and the one style by their SHA-256, so that nothing else in the file can run, and nothing is fetched.
"""

from __future__ import annotations

import base64
import hashlib
import io
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from minicpm_tune import __version__

_FOLDER = Path(__file__).parent
_QUALITY = 78  # of WebP, of 100


def render(template: str, **values: Any) -> str:
    """Fill in a page.

    Args:
        template: ``data.html`` or ``run.html``.
        **values: What the template asks for; a missing one is an error.
    """
    style, script = ((_FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; img-src data:; media-src data:; style-src {_source(style)}; "
        f"script-src {_source(script)}; base-uri 'none'; form-action 'none'"
    )
    return (
        _templates()
        .get_template(template)
        .render(style=style, script=script, policy=policy, version=__version__, **values)
    )


@cache
def _templates() -> Environment:
    templates = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["number"] = shown_number
    return templates


def _source(text: str) -> str:
    """How a Content-Security-Policy names a script or style that stands in the page."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def shown_number(value: Any) -> str:
    """A number for reading: thousands separated, four significant digits below a thousand.

    Example:
        >>> [shown_number(value) for value in (12345, 0.00012345, 12.3456, 3.0)]
        ['12,345', '0.0001234', '12.35', '3']
    """
    if isinstance(value, float) and abs(value) < 1000:
        return f"{value:.4g}"
    return f"{value:,.0f}" if isinstance(value, float) else f"{value:,}"


def data_uri(content: bytes, kind: str) -> str:
    """Bytes as an address that holds them.

    Args:
        content: The bytes of a file.
        kind: Its media type, such as ``audio/wav``.
    """
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def thumbnail(picture: Image.Image, side: int) -> bytes:
    """A picture as WebP.

    Args:
        picture: In mode RGB.
        side: Its longest side, in pixels; a smaller picture keeps its size.
    """
    small = picture.copy()
    small.thumbnail((side, side))
    file = io.BytesIO()
    small.save(file, "WEBP", quality=_QUALITY)
    return file.getvalue()
