"""What ``inspect_data.py`` reports of a data set: a summary as text and as JSON, and an HTML page."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from minicpm_tune.data.bad_rows import BadRow
from minicpm_tune.data.samples import TrainingRows
from minicpm_tune.pages.page import Histogram, histogram, render
from minicpm_tune.planning.row_statistics import (
    COLUMNS,
    DataStatistics,
    padding_shares,
    recommended_length,
    recommended_slices,
    samples_per_epoch,
    token_zero,
)
from minicpm_tune.planning.row_view import view_row

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
_SHOWN_ROWS = 20
_LISTED_ROWS = 1000
PAGE_LIMIT = 24 * 2**20  # characters that the pictures and sounds of a page may take
GROUPS = ("first", "problems", "longest", "random")


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
        "problems": dict(Counter(one.kind for one in found.bad).most_common()),
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
    cut = f"{summary['cut_by_model_max_length']} of them cut at --model_max_length {summary['model_max_length']}"
    lines = [
        f"model        {summary['generation']}",
        f"rows         {summary['rows']} ({summary['with_pictures']} with pictures, {with_audio}"
        f"{summary['text_only']} text only)",
        f"usable       {summary['usable']} ({cut}, {summary['dropped_as_over_long']} more dropped)",
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
    found = {
        "over-long": over,
        "token id 0": summary["rows_with_token_id_0"],
        "unknown keys": summary["unknown_keys"],
    }
    return {title: text for title, text in lines.items() if found.get(title, True)}


def _counted(rows: int) -> str:
    return f"{rows:,} row{'' if rows == 1 else 's'}"


def _rows_with(found: DataStatistics, kind: str) -> str:
    """Numbers of the rows with a problem, by file."""
    numbers = defaultdict(list)
    for bad in found.bad:
        if bad.kind == kind:
            numbers[bad.file].append(bad.row)
    shown = {
        file: "rows " + ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
        for file, rows in numbers.items()
    }
    return "; ".join(text if len(shown) == 1 else f"{file}: {text}" for file, text in shown.items())


def as_page(summary: dict[str, Any], found: DataStatistics, rows: TrainingRows, *, shown: int) -> str:
    """The summary as an HTML page, with histograms and a look at some rows.

    Args:
        summary: From ``summarize``.
        found: What was found in the rows.
        rows: The data set.
        shown: How many rows of each of ``GROUPS`` the page shows.
    """
    chosen = choose_rows(found, rows, shown)
    cards = _cards(chosen, found, rows)
    problems: dict[str, list[BadRow]] = {kind: [] for kind in summary["problems"]}
    for one in found.bad[:_LISTED_ROWS]:
        problems[one.kind].append(one)
    return render(
        "data.html",
        summary=summary,
        files=[Path(name).name for name in rows.mixture.names],
        paths=rows.mixture.names,
        advice=_advice(summary),
        percents=tuple(_PERCENTS.values()),
        spreads=[(title, summary[name]) for name, title in _SPREADS.items() if summary[name]],
        charts=_charts(found, rows),
        problems=problems,
        unlisted=max(len(found.bad) - _LISTED_ROWS, 0),
        cards=cards,
        groups={name: sum(name in groups for groups in chosen.values()) for name in GROUPS},
        kinds=sorted({card["bad"].kind for card in cards if card["bad"]}),
        image_limit=PAGE_LIMIT // 2**20,
    )


def choose_rows(found: DataStatistics, rows: TrainingRows, count: int) -> dict[int, list[str]]:
    """Choose rows to show: the first, some of every problem, the longest, and random ones.

    Args:
        found: What was found in the rows.
        rows: The data set.
        count: How many of each of ``GROUPS``.

    Returns:
        Row number -> the groups it is in, those of the first group first.
    """
    by_kind = defaultdict(list)
    for one in found.bad:
        by_kind[one.kind].append(_place(rows, one))
    in_turn = [place for places in zip_longest(*by_kind.values()) for place in places if place is not None]
    longest = found.column("place")[np.argsort(-found.column("length"), kind="stable")[:count]]
    picks = {
        "first": range(min(count, found.row_count)),
        "problems": in_turn[:count],
        "longest": longest.tolist(),
        "random": np.random.default_rng(0).permutation(found.row_count)[:count].tolist(),
    }
    chosen: dict[int, list[str]] = {}
    for name in GROUPS:
        for place in picks[name]:
            chosen.setdefault(place, []).append(name)
    return chosen


def _cards(chosen: dict[int, list[str]], found: DataStatistics, rows: TrainingRows) -> list[dict[str, Any]]:
    """What the page shows of each row; together they keep to the page's limit."""
    measured = dict(zip(found.column("place").tolist(), found.numbers.tolist(), strict=True))
    problems = {_place(rows, one): one for one in found.bad}
    cards: list[dict[str, Any]] = []
    room = PAGE_LIMIT
    for place, groups in chosen.items():
        view = view_row(rows, place, room=room // (len(chosen) - len(cards)))
        room -= view.cost
        source, row = rows.mixture.origin(place)
        bad = problems.get(place)
        row_id = bad.id if bad and view.row_id is None else view.row_id
        facts = dict(zip(COLUMNS, measured.get(place, ()), strict=False))
        card = {"view": view, "facts": facts, "groups": groups, "bad": bad}
        cards.append({**card, "place": place, "source": source, "row": row, "id": row_id})
    return cards


def _place(rows: TrainingRows, bad: BadRow) -> int:
    """The number of a bad row through all files."""
    return rows.mixture.first_row(rows.mixture.names.index(bad.file)) + bad.row


def _charts(found: DataStatistics, rows: TrainingRows) -> list[Histogram]:
    """How the rows are spread; what no row has gives no histogram."""
    length, video, audio = (found.column(name) for name in ("length", "video_ms", "audio_ms"))
    limit = rows.processing.arguments.model_max_length
    charts = [
        histogram("Tokens", length, mark=(limit, f"--model_max_length {limit:,}") if limit else None),
        histogram("Supervised share", 100 * found.column("supervised") / np.maximum(length, 1), unit=" %"),
        histogram("Image tokens", found.column("image_tokens")),
        histogram("Images", found.column("images")),
        histogram("Slices", found.column("slices")),
        histogram("Seconds of video", video[video > 0] / 1000, unit=" s"),
        histogram("Seconds of audio", audio[audio > 0] / 1000, unit=" s"),
    ]
    return [one for one in charts if one is not None]
