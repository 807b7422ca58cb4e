"""What ``inspect_data.py`` says about a data set: a summary in text and as JSON, and a page to look at."""

from __future__ import annotations

import html
from collections import defaultdict
from typing import Any

import numpy as np

from minicpm_tune.data.samples import TrainingRows
from minicpm_tune.planning.data_facts import DataFacts, padding_shares, recommended_length, recommended_slices

_PERCENTS = (0, 50, 90, 99, 100)
_BARS = 40
_SHOWN_ROWS = 20
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 62em; padding: 0 1em; color: #222;
} table { border-collapse: collapse; margin: .6em 0 1.4em; } td, th { border-bottom: 1px solid #ddd; padding:
.25em .8em; text-align: right; } td:first-child, th:first-child, td.text { text-align: left; } svg {
background: #fafafa; border: 1px solid #ddd; margin: .3em 1em 1em 0; } .bad { color: #b00020; }
"""


def summarize(found: DataFacts, rows: TrainingRows, *, batch_size: int) -> dict[str, Any]:
    """Everything that is known of all rows, as plain values.

    Args:
        found: What was seen in the rows.
        rows: The data set.
        batch_size: Rows that are padded to the same length.
    """
    limit = rows.processing.arguments.model_max_length
    length = found.column("length")
    kept = length if limit is None else np.minimum(length, limit)
    over = int((length > limit).sum()) if limit is not None else 0
    shares = padding_shares(kept, batch_size=batch_size, capacity=limit)
    return {
        "generation": rows.processing.generation.title,
        "rows": found.row_count,
        "usable": found.usable,
        "bad": len(found.bad),
        "problems": dict(found.kinds.most_common()),
        "dropped_as_over_long": found.dropped,
        "cut_by_model_max_length": found.cut,
        "over_model_max_length": over,
        "model_max_length": limit,
        "with_pictures": int((found.column("pictures") > 0).sum()),
        "text_only": int((found.column("pictures") == 0).sum()),
        "tokens": _spread(length),
        "image_tokens": _spread(found.column("image_tokens")),
        "text_tokens": _spread(length - found.column("image_tokens")),
        "supervised_tokens": _spread(found.column("supervised")),
        "slices": _spread(found.column("slices")),
        "samples_per_epoch": len(rows),
        "tokens_per_epoch": _tokens_per_epoch(found, rows, kept),
        "recommended_model_max_length": recommended_length(found),
        "recommended_max_slice_nums": recommended_slices(found, limit),
        "padding_share": round(shares["plain"], 4),
        "padding_share_packed": round(shares["packed"], 4),
        "batch_size": batch_size,
    }


def _spread(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    middle = np.percentile(values, _PERCENTS, method="nearest").tolist()
    return {**{f"{percent}%": value for percent, value in zip(_PERCENTS, middle, strict=True)},
            "mean": round(float(values.mean()), 1), "sum": int(values.sum(dtype=np.int64))}  # fmt: skip


def _tokens_per_epoch(found: DataFacts, rows: TrainingRows, kept: np.ndarray) -> int:
    source = found.column("source")
    total = 0.0
    for number, one in enumerate(rows.mixture.files):
        mine = kept[source == number]
        if len(mine):
            total += mine.sum(dtype=np.int64) / len(one.rows) * one.samples
    return round(total)


def as_text(summary: dict[str, Any], found: DataFacts) -> str:
    """The summary for the terminal."""
    lines = [
        f"model        {summary['generation']}",
        f"rows         {summary['rows']} ({summary['with_pictures']} with pictures, {summary['text_only']} "
        "text only)",
        f"usable       {summary['usable']} ({summary['cut_by_model_max_length']} cut at --model_max_length "
        f"{summary['model_max_length']}, {summary['dropped_as_over_long']} more dropped)",
        f"bad          {summary['bad']}",
    ]
    lines += [f"  {count:7} {kind}: {_rows_with(found, kind)}" for kind, count in summary["problems"].items()]
    heads = "".join(f"{percent:7} %" for percent in _PERCENTS)
    lines += ["", f"per row      {heads}     mean          sum"]
    for name in ("tokens", "text_tokens", "image_tokens", "supervised_tokens", "slices"):
        spread = summary[name]
        if spread:
            cells = "".join(f"{spread[f'{percent}%']:9}" for percent in _PERCENTS)
            lines.append(f"{name.replace('_tokens', ''):12} {cells} {spread['mean']:8} {spread['sum']:12}")
    lines += [
        "",
        f"longer than --model_max_length {summary['model_max_length']}: {summary['over_model_max_length']} "
        "rows",
        f"recommended  --model_max_length {summary['recommended_model_max_length']} (99 % of the rows whole) "
        f"--max_slice_nums {summary['recommended_max_slice_nums']}",
        f"padding      {summary['padding_share']:.1%} with --per_device_train_batch_size "
        f"{summary['batch_size']}, "
        f"{summary['padding_share_packed']:.1%} with --packing true",
        f"an epoch     {summary['samples_per_epoch']} samples, {summary['tokens_per_epoch']} tokens",
    ]
    if found.bad:
        lines += ["", *(str(bad) for bad in found.bad[:_SHOWN_ROWS])]
        more = len(found.bad) - _SHOWN_ROWS
        lines += [f"... and {more} more; --json lists all"] if more > 0 else []
    return "\n".join(lines)


def _rows_with(found: DataFacts, kind: str) -> str:
    """Row numbers with a problem, by file."""
    numbers = defaultdict(list)
    for bad in found.bad:
        if bad.kind == kind:
            numbers[bad.file].append(bad.row)
    parts = []
    for file, rows in numbers.items():
        shown = ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
        parts.append(f"rows {shown}" if len(numbers) == 1 else f"{file}: rows {shown}")
    return "; ".join(parts)


def as_html(summary: dict[str, Any], found: DataFacts, rows: TrainingRows) -> str:
    """The summary as a page of its own, with histograms."""
    length = found.column("length")
    limit = rows.processing.arguments.model_max_length
    charts = [
        _histogram("tokens per row", length, mark=limit),
        _histogram("text tokens per row", length - found.column("image_tokens")),
        _histogram("image tokens per row", found.column("image_tokens")),
        _histogram("supervised tokens per row", found.column("supervised")),
        _histogram("slices per row", found.column("slices")),
    ]
    plain = [(key, value) for key, value in summary.items() if not isinstance(value, dict)]
    spreads = [(key, value) for key, value in summary.items() if isinstance(value, dict) and "mean" in value]
    parts = [
        f"<!doctype html><meta charset='utf-8'><title>Data report</title><style>{_STYLE}</style>",
        f"<h1>{_escaped(', '.join(rows.mixture.names))}</h1>",
        _table([("", "")], [(key.replace("_", " "), value) for key, value in plain]),
        "<h2>Per row</h2>",
        _table([("", *(f"{percent} %" for percent in _PERCENTS), "mean", "sum")],
               [(key.replace("_", " "), *value.values()) for key, value in spreads]),
        *charts,
    ]  # fmt: skip
    if found.bad:
        parts.append(f"<h2 class='bad'>{len(found.bad)} rows can't be used</h2>")
        parts.append(_table([("problem", "rows")], list(summary["problems"].items())))
        listed = [
            (bad.file, bad.row, bad.id if bad.id is not None else "", bad.reason) for bad in found.bad[:1000]
        ]
        parts.append(_table([("file", "row", "id", "reason")], listed))
    return "\n".join(parts)


def _table(head: list[tuple[Any, ...]], body: list[tuple[Any, ...]]) -> str:
    lines = ["<table>"]
    for tag, lists in (("th", head), ("td", body)):
        for row in lists:
            if any(str(cell) for cell in row):
                lines.append("<tr>" + "".join(f"<{tag}>{_escaped(cell)}</{tag}>" for cell in row) + "</tr>")
    return "\n".join([*lines, "</table>"])


def _histogram(title: str, values: np.ndarray, *, mark: int | None = None) -> str:
    """An SVG picture of how values are spread; ``mark`` draws a line at a value."""
    if not len(values):
        return ""
    top = int(max(values.max(), 1))
    counts, edges = np.histogram(values, bins=min(_BARS, top + 1), range=(0, top + 1))
    width, height, left = 440, 150, 8
    step = (width - 2 * left) / len(counts)
    bars = "".join(
        f"<rect x='{left + index * step:.1f}' y='{height - 22 - count / counts.max() * 100:.1f}' "
        f"width='{max(step - 1, 1):.1f}' height='{count / counts.max() * 100:.1f}' fill='#4477aa'>"
        f"<title>{edges[index]:.0f} to {edges[index + 1]:.0f}: {count} rows</title></rect>"
        for index, count in enumerate(counts)
    )
    line = ""
    if mark is not None and mark <= top:
        place = left + mark / (top + 1) * (width - 2 * left)
        line = f"<line x1='{place:.1f}' x2='{place:.1f}' y1='24' y2='{height - 22}' stroke='#b00020'/>"
    return (
        f"<svg width='{width}' height='{height}' role='img'><text x='{left}' "
        f"y='16'>{_escaped(title)}</text>{bars}{line}"
        f"<text x='{left}' y='{height - 6}' font-size='12'>0</text>"
        f"<text x='{width - left}' y='{height - 6}' font-size='12' text-anchor='end'>{top}</text></svg>"
    )


def _escaped(value: Any) -> str:
    return html.escape(str(value))
