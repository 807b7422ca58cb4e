"""Reports as single HTML files: style, script and data stand in the file, and it asks for nothing from outside.

The templates escape every value by themselves (Jinja2's autoescape). The Content-Security-Policy in the page names
the one script and the one style by their SHA-256, so that nothing else in the file can run, and nothing is fetched.
Charts are places in percent, which the templates draw as SVG that fits every width.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from minicpm_tune import __version__

_FOLDER = Path(__file__).parent
_QUALITY = 78  # of WebP, of 100
_BARS = 40
_OUTLYING = 4  # times the 90th percentile
_MOST_POINTS = 1000  # of a drawn line
_TOP_ROOM = 1.04  # the axis ends a little above the largest value

Tick = tuple[float, str]
"""Where a label stands, in percent of the axis, and what it says."""


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
    page = _templates().get_template(template)
    return page.render(style=style, script=script, policy=policy, version=__version__, **values)


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


@dataclass(frozen=True)
class Histogram:
    """How values are spread.

    Attributes:
        title: What is counted, with its unit.
        bars: (left, width, height) in percent, and what the bar says.
        ticks: Labels below.
        most: Rows of the highest bar.
        mark: Where a line stands, and what it says.
        facts: A few numbers about all values.
    """

    title: str
    bars: tuple[tuple[float, float, float, str], ...]
    ticks: tuple[Tick, ...]
    most: int
    mark: Tick | None
    facts: str


def histogram(
    title: str, values: np.ndarray, *, unit: str = "", mark: tuple[float, str] | None = None
) -> Histogram | None:
    """Count values in up to 40 bars of equal width.

    Args:
        title: What is counted.
        values: One for each row, from 0.
        unit: Written behind the numbers.
        mark: A value at which a line is drawn when it lies in the range, and its name.

    Returns:
        The histogram; None when there is no value, or none but 0.
    """
    if not len(values) or not values.max() > 0:
        return None
    whole = bool(np.issubdtype(values.dtype, np.integer))
    step, bars = _bars(values, whole)
    top = step * bars
    beyond = bool(values.max() > (top - 1 if whole else top))
    counts = np.bincount(np.minimum(values // step, bars - 1).astype(np.int64), minlength=bars)
    drawn = []
    for place, count in enumerate(counts.tolist()):
        first, last = place * step, (place + 1) * step - whole
        span = shown_number(first) if first == last else f"{shown_number(first)} to {shown_number(last)}"
        if beyond and place == bars - 1:
            span = f"{shown_number(first)} and more"
        rows = "1 row" if count == 1 else f"{count:,} rows"
        drawn.append((100 * place / bars, 100 / bars, 100 * count / counts.max(), f"{span}{unit}: {rows}"))
    middle = 0.5 if whole and step == 1 else 0.0  # the bar stands for one number
    places = _ticks(0, top - middle, most=4, whole=whole)
    ticks = [(100 * (tick + middle) / top, shown_number(tick)) for tick in places]
    if beyond:
        ticks = [*(tick for tick in ticks if tick[0] < 75), (100.0, f"≥ {shown_number(top - step)}")]
    line = (100 * mark[0] / top, mark[1]) if mark is not None and mark[0] < top else None
    facts = f"median {shown_number(float(np.median(values)))}{unit}, largest {shown_number(float(values.max()))}{unit}"
    return Histogram(title, tuple(drawn), tuple(ticks), int(counts.max()), line, facts)


def _bars(values: np.ndarray, whole: bool) -> tuple[float, int]:
    """The width and the number of bars. Where few values are far above all others, the last bar holds those."""
    common, top = float(np.percentile(values, 90)), float(values.max())
    top = min(top, _OUTLYING * common or top)
    if not whole:
        return top / _BARS or 1.0, _BARS
    step = max(-(-int(top + 1) // _BARS), 1)
    return step, -(-int(top + 1) // step)


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: Its name in the legend.
        points: (x, y) in the chart's units.
        look: ``faint``, ``line`` or ``dots``.
        color: 0 is the accent; 1 and 2 differ from it in lightness as well as in hue.
    """

    name: str
    points: Sequence[tuple[float, float]]
    look: str = "line"
    color: int = 0


@dataclass(frozen=True)
class Chart:
    """Lines over the steps of a run.

    Attributes:
        title: What is drawn, with its unit.
        lines: Of every series its name, look, color, and its points in percent as an SVG polyline takes them.
        x_ticks: Labels below.
        y_ticks: Labels at the left, in percent from the bottom.
        values: What the script shows under the pointer: of every series its points as they are.
        last_step: Where the horizontal axis ends.
    """

    title: str
    lines: tuple[dict[str, Any], ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    values: list[dict[str, Any]]
    last_step: float


def chart(title: str, series: Sequence[Series], *, last_step: int, from_zero: bool = False) -> Chart | None:
    """Lay out lines over steps.

    Args:
        title: What is drawn, with its unit.
        series: The lines; those without a point are left out.
        last_step: Where the horizontal axis ends.
        from_zero: Whether the vertical axis begins at 0.

    Returns:
        The chart; None without any point.
    """
    series = [one for one in series if one.points]
    if not series:
        return None
    # Single spikes of a faint line may leave the picture; the mean beside it sets the scale.
    scaled = [one for one in series if one.look != "faint"] or series
    heights = np.array([y for one in scaled for _, y in one.points])
    low, high = (0.0 if from_zero else float(heights.min())), float(heights.max())
    if high <= low:
        low, high = (0.0, high) if high > 0 else (low - 1, low + 1)
    y_ticks = _ticks(low, low + (high - low) * _TOP_ROOM, most=4)
    low, high = min(low, y_ticks[0]), max(low + (high - low) * _TOP_ROOM, y_ticks[-1])
    right = max(last_step, 1)
    lines, values = [], []
    for one in series:
        points = thinned(one.points)
        places = [(100 * x / right, 100 * (high - y) / (high - low)) for x, y in points]
        path = " ".join(f"{x:.2f},{y:.2f}" for x, y in places)
        lines.append({"name": one.name, "look": one.look, "color": one.color, "path": path, "places": places})
        values.append({"name": one.name, "points": [[x, float(f"{y:.6g}")] for x, y in points]})
    x_ticks = _ticks(0, right, most=5, whole=True)
    return Chart(
        title=title,
        lines=tuple(lines),
        x_ticks=tuple((100 * tick / right, shown_number(int(tick))) for tick in x_ticks),
        y_ticks=tuple((100 * (tick - low) / (high - low), shown_number(float(tick))) for tick in y_ticks),
        values=values,
        last_step=right,
    )


def thinned(points: Sequence[tuple[float, float]], most: int = _MOST_POINTS) -> list[tuple[float, float]]:
    """At most so many points of a line: of every stretch its lowest and highest, so that spikes stay.

    Example:
        >>> thinned([(0, 1.0), (1, 9.0), (2, 2.0), (3, 3.0)], most=2)
        [(0, 1.0), (1, 9.0)]
    """
    if len(points) <= most:
        return list(points)
    kept = []
    for stretch in np.array_split(np.arange(len(points)), most // 2):
        ordered = sorted(stretch.tolist(), key=lambda place: points[place][1])
        kept += [points[place] for place in sorted({ordered[0], ordered[-1]})]
    return kept


def _ticks(low: float, high: float, *, most: int, whole: bool = False) -> list[float]:
    """Round numbers from ``low`` to ``high``."""
    from matplotlib.ticker import MaxNLocator  # half a second, and only reports need it

    found = MaxNLocator(nbins=most, integer=whole, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    room = (high - low) * 1e-9
    inside = [round(float(tick), 12) for tick in found if low - room <= tick <= high + room]
    return inside or [low, high]
