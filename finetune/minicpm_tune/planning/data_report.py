"""What ``inspect_data.py`` reports of a data set: a summary as text and as JSON, and an HTML page."""

from __future__ import annotations

import html
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from minicpm_tune.data.samples import TrainingRows
from minicpm_tune.planning.row_statistics import (
    DataStatistics,
    padding_shares,
    recommended_length,
    recommended_slices,
    samples_per_epoch,
    token_zero,
)

_PERCENTS = {0: "min", 50: "median", 90: "90 %", 99: "99 %", 100: "max"}
_SPREADS = {
    "tokens": "tokens",
    "text_tokens": "text tokens",
    "image_tokens": "image tokens",
    "audio_tokens": "audio tokens",
    "audio_seconds": "seconds of audio",
    "supervised_tokens": "supervised tokens",
    "slices": "slices",
}
_BARS = 40
_SHOWN_ROWS = 20
_LISTED_ROWS = 1000
_LONG_TEXT = 30  # characters; columns with more may break anywhere
_STYLE = """
:root { color-scheme: light dark; --line: #d8d8d8; --soft: #f6f6f6; --bar: #4477aa; --bad: #b00020; }
@media (prefers-color-scheme: dark) { :root { --line: #444; --soft: #222; --bar: #7aa6d6; --bad: #ff6b81; } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5em auto; max-width: 62em; padding: 0 1em; }
h1 { font-size: 1.4em; overflow-wrap: anywhere; } h2 { font-size: 1.15em; margin: 1.8em 0 .4em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .4em 0 1em; }
td, th { border-bottom: 1px solid var(--line); padding: .3em .8em; text-align: left; vertical-align: top; }
td:first-child, th:first-child { padding-left: 0; white-space: nowrap; }
td:last-child, th:last-child { padding-right: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.text { min-width: 14em; overflow-wrap: anywhere; } .flag { white-space: nowrap; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24em), 1fr)); gap: 1em; }
figure { margin: 0; } figcaption { font-size: .9em; }
svg { display: block; width: 100%; height: auto; background: var(--soft); border: 1px solid var(--line); }
svg text { fill: currentColor; font-size: 12px; } .bar { fill: var(--bar); } .mark { stroke: var(--bad); }
.bad { color: var(--bad); }
"""


def summarize(found: DataStatistics, rows: TrainingRows, *, batch_size: int) -> dict[str, Any]:
    """Everything that is known of all rows, as plain values.

    Args:
        found: What was found in the rows.
        rows: The data set.
        batch_size: Rows that are padded to the same length.
    """
    limit = rows.processing.arguments.model_max_length
    length, kept, audio = found.column("length"), found.column("kept"), found.column("audio_tokens")
    shares = padding_shares(kept[kept > 0], batch_size=batch_size, capacity=limit)
    samples, tokens = samples_per_epoch(found, rows)
    return {
        "generation": rows.processing.generation.title,
        "rows": found.row_count,
        "usable": found.usable,
        "bad": len(found.bad),
        "problems": dict(found.kinds.most_common()),
        "dropped_as_over_long": found.dropped,
        "cut_by_model_max_length": found.cut,
        "over_model_max_length": 0 if limit is None else int((length > limit).sum()),
        "model_max_length": limit,
        "with_pictures": int((found.column("pictures") > 0).sum()),
        "with_audio": int((audio > 0).sum()),
        "text_only": int(((found.column("pictures") == 0) & (audio == 0)).sum()),
        "tokens": _spread(length),
        "image_tokens": _spread(found.column("image_tokens")),
        # Of the rows that have audio; without any, nothing is said of it.
        "audio_tokens": _spread(audio[audio > 0]),
        "audio_seconds": _spread(found.column("audio_ms")[audio > 0] / 1000),
        "text_tokens": _spread(length - found.column("image_tokens") - audio),
        "supervised_tokens": _spread(found.column("supervised")),
        "slices": _spread(found.column("slices")),
        "samples_per_epoch": samples,
        "tokens_per_epoch": tokens,
        "recommended_model_max_length": recommended_length(found),
        "recommended_max_slice_nums": recommended_slices(found, limit),
        "padding_share": round(shares["plain"], 4),
        "padding_share_packed": round(shares["packed"], 4),
        "batch_size": batch_size,
        "token_id_0": token_zero(rows.processing.tokenizer),
        "rows_with_token_id_0": int(found.column("token_zero").sum()),
        "unknown_keys": dict(found.unknown_keys.most_common()),
    }


def _spread(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    found = np.percentile(values, list(_PERCENTS), method="nearest").tolist()
    spread = {f"{percent}%": value for percent, value in zip(_PERCENTS, found, strict=True)}
    return {**spread, "mean": round(float(values.mean()), 1), "sum": int(values.sum(dtype=np.int64))}


def as_text(summary: dict[str, Any], found: DataStatistics) -> str:
    """The summary for the terminal."""
    with_audio = f"{summary['with_audio']} with audio, " if summary["with_audio"] else ""
    lines = [
        f"model        {summary['generation']}",
        f"rows         {summary['rows']} ({summary['with_pictures']} with pictures, {with_audio}"
        f"{summary['text_only']} text only)",
        f"usable       {summary['usable']} ({_cut_and_dropped(summary)})",
        f"bad          {summary['bad']}",
    ]
    lines += [f"  {count:7} {kind}: {_rows_with(found, kind)}" for kind, count in summary["problems"].items()]
    lines += [
        "",
        f"{'per row':18}" + "".join(f"{head:>9}" for head in (*_PERCENTS.values(), "mean")) + f"{'sum':>14}",
    ]
    for name, title in _SPREADS.items():
        *cells, total = summary[name].values() or (0,)
        lines += [f"{title:18}" + "".join(f"{cell:9}" for cell in cells) + f"{total:14}"] if cells else []
    lines += ["", *(f"{title:13}{text}" for title, text in _advice(summary).items())]
    if found.bad:
        lines += ["", *(str(bad) for bad in found.bad[:_SHOWN_ROWS])]
        more = len(found.bad) - _SHOWN_ROWS
        lines += [f"... and {more} more; --json lists all"] if more > 0 else []
    return "\n".join(lines)


def _cut_and_dropped(summary: dict[str, Any]) -> str:
    cut = f"{summary['cut_by_model_max_length']} of them cut at --model_max_length {summary['model_max_length']}"
    return f"{cut}, {summary['dropped_as_over_long']} more dropped"


def _advice(summary: dict[str, Any]) -> dict[str, str]:
    """What follows for a training: title -> text of each line."""
    limit, over = summary["model_max_length"], summary["over_model_max_length"]
    lines = {
        "over-long": f"{_counted(over)} longer than --model_max_length {limit}: raise it, or use --overlength "
        "shrink_slices, which cuts the images of such rows into fewer slices",
        "recommended": f"--model_max_length {summary['recommended_model_max_length']} (99 % of the rows whole) "
        f"--max_slice_nums {summary['recommended_max_slice_nums']}",
        "padding": f"{summary['padding_share']:.1%} with --per_device_train_batch_size {summary['batch_size']}, "
        f"{summary['padding_share_packed']:.1%} with --packing true",
        "an epoch": f"{summary['samples_per_epoch']:,} samples, {summary['tokens_per_epoch']:,} tokens",
        "token id 0": f"{_counted(summary['rows_with_token_id_0'])} with {summary['token_id_0']!r}, which the released "
        "chat() hides from the model in prompts and drops from answers",
        "unknown keys": "nothing reads "
        + ", ".join(f"{key} ({_counted(count)})" for key, count in summary["unknown_keys"].items()),
    }
    absent = {"over-long": not over, "token id 0": not summary["rows_with_token_id_0"],
              "unknown keys": not summary["unknown_keys"]}  # fmt: skip
    return {title: text for title, text in lines.items() if not absent.get(title)}


def _counted(rows: int) -> str:
    return f"{rows:,} row{'' if rows == 1 else 's'}"


def _rows_with(found: DataStatistics, kind: str) -> str:
    """Numbers of the rows with a problem, by file."""
    numbers = defaultdict(list)
    for bad in found.bad:
        if bad.kind == kind:
            numbers[bad.file].append(bad.row)
    parts = []
    for file, rows in numbers.items():
        shown = ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
        parts.append(f"rows {shown}" if len(numbers) == 1 else f"{file}: rows {shown}")
    return "; ".join(parts)


def as_html(summary: dict[str, Any], found: DataStatistics, rows: TrainingRows) -> str:
    """The summary as a page of its own, with histograms."""
    length, images = found.column("length"), found.column("image_tokens")
    charts = [
        _histogram("tokens per row", length, mark=rows.processing.arguments.model_max_length),
        _histogram("text tokens per row", length - images),
        _histogram("image tokens per row", images),
        _histogram("supervised tokens per row", found.column("supervised")),
        _histogram("slices per row", found.column("slices")),
    ]
    counts = [
        ("model", summary["generation"]),
        ("rows", f"{summary['rows']:,}"),
        ("with pictures", f"{summary['with_pictures']:,}"),
        ("text only", f"{summary['text_only']:,}"),
        ("usable", f"{summary['usable']:,} ({_cut_and_dropped(summary)})"),
        ("bad", f"{summary['bad']:,}"),
    ]
    spreads = [(title, *summary[name].values()) for name, title in _SPREADS.items() if summary[name]]
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>Data report</title><style>{_STYLE}</style>",
        f"<h1>{_escaped(', '.join(rows.mixture.names))}</h1>",
        _table((), counts),
        "<h2>For the training</h2>",
        _table((), list(_advice(summary).items())),
        "<h2>Per row</h2>",
        _table(("", *_PERCENTS.values(), "mean", "sum"), spreads),
        f"<div class='charts'>{''.join(charts)}</div>",
    ]
    if found.bad:
        parts.append(f"<h2 class='bad'>{len(found.bad):,} rows can't be used</h2>")
        parts.append(_table(("problem", "rows"), list(summary["problems"].items())))
        listed = found.bad[:_LISTED_ROWS]
        lines = [(bad.row, "" if bad.id is None else str(bad.id), bad.reason, bad.file) for bad in listed]
        shown = 4 if len(rows.mixture.names) > 1 else 3  # a single file stands in the title
        parts.append(_table(("row", "id", "reason", "file")[:shown], [line[:shown] for line in lines]))
        if len(found.bad) > _LISTED_ROWS:
            parts.append(f"<p>... and {len(found.bad) - _LISTED_ROWS:,} more; --json lists all.</p>")
    return "\n".join(parts)


def _table(head: Sequence[str], body: Sequence[Sequence[Any]]) -> str:
    """A table that scrolls within the page where it is too wide; numbers are set to the right."""
    classes = [_class(column) for column in zip(*body, strict=True)]
    lines = ["<div class='wide'><table>"]
    for tag, rows in (("th", [head] if head else []), ("td", body)):
        for row in rows:
            cells = zip(row, classes, strict=True)
            lines.append(
                "<tr>" + "".join(f"<{tag}{kind}>{_cell(cell)}</{tag}>" for cell, kind in cells) + "</tr>"
            )
    return "\n".join([*lines, "</table></div>"])


def _class(column: Sequence[Any]) -> str:
    if isinstance(column[0], (int, float)):
        return " class='number'"
    return " class='text'" if max(map(len, column)) > _LONG_TEXT else ""


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}"
    if isinstance(value, int):
        return f"{value:,}"
    return re.sub(r"--\w+", r"<span class='flag'>\g<0></span>", _escaped(value))


def _histogram(title: str, values: np.ndarray, *, mark: int | None = None) -> str:
    """An SVG picture of how values are spread; ``mark`` draws a line at a value."""
    if not len(values):
        return ""
    top = int(max(values.max(), 1))
    counts, edges = np.histogram(values, bins=min(_BARS, top + 1), range=(0, top + 1))
    width, height, left = 440, 130, 8
    step = (width - 2 * left) / len(counts)
    bars = "".join(
        f"<rect class='bar' x='{left + index * step:.1f}' y='{height - 22 - count / counts.max() * 100:.1f}' "
        f"width='{max(step - 1, 1):.1f}' height='{count / counts.max() * 100:.1f}'>"
        f"<title>{edges[index]:.0f} to {edges[index + 1]:.0f}: {count} rows</title></rect>"
        for index, count in enumerate(counts)
    )
    line, note = "", ""
    if mark is not None and mark <= top:
        place = left + mark / (top + 1) * (width - 2 * left)
        line = f"<line class='mark' x1='{place:.1f}' x2='{place:.1f}' y1='4' y2='{height - 22}'/>"
        note = f"; the line is --model_max_length {mark:,}"
    return (
        f"<figure><figcaption>{_escaped(title)}{note}</figcaption>"
        f"<svg viewBox='0 0 {width} {height}' role='img' aria-label='{_escaped(title)}'>{bars}{line}"
        f"<text x='{left}' y='{height - 6}'>0</text>"
        f"<text x='{width - left}' y='{height - 6}' text-anchor='end'>{top:,}</text></svg></figure>"
    )


def _escaped(value: Any) -> str:
    return html.escape(str(value))
