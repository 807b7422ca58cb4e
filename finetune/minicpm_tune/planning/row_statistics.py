"""What ``inspect_data.py`` measures in each row, and what follows for the whole data set.

Shapes: N rows, M the highest limit of slices.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from minicpm_tune.batch import Sample
from minicpm_tune.data.bad_rows import BadRow
from minicpm_tune.data.media.images import Picture
from minicpm_tune.data.placeholders import PlaceholderStyle
from minicpm_tune.data.sample_tensors import Plan
from minicpm_tune.data.samples import TrainingRows
from minicpm_tune.data.sampling import pack_in_windows
from minicpm_tune.data.slicing.layouts import ImageLayout
from minicpm_tune.errors import DroppedRowError, RowError
from minicpm_tune.planning.row_view import patch_strips

# What is measured in a row. ``length``: tokens before --model_max_length applies; ``kept``: tokens that training sees,
# 0 when the row can't be used; ``token_zero``: 1 when the text holds token id 0; ``audio_tokens``: those of whole
# placeholders, as of images; ``_ms``: milliseconds; ``place``: the row's number through all files.
COLUMNS = (
    "length", "kept", "image_tokens", "supervised", "pictures", "slices", "most_slices", "source", "token_zero",
    "audio_tokens", "audio_ms", "video_ms", "images", "place",
)  # fmt: skip
_PACKING_WINDOW = 4096


@dataclass(frozen=True)
class RowFacts:
    """What was found in a row.

    Attributes:
        numbers: One integer for each of ``COLUMNS``; None for a row that no --model_max_length makes usable.
        lengths: Tokens of the whole row with at most 1, 2, ... M slices per image.
        bad: The problem, if the row has one.
        dropped: Whether the user asked to leave such rows out.
        cut: Whether ``--model_max_length`` cuts it.
        unknown_keys: Keys in it that nothing reads.
        details: The row as one line of JSON, when asked for.
    """

    numbers: tuple[int, ...] | None = None
    lengths: tuple[int, ...] = ()
    bad: BadRow | None = None
    dropped: bool = False
    cut: bool = False
    unknown_keys: tuple[str, ...] = ()
    details: str | None = None


def measure_row(rows: TrainingRows, index: int, *, decode: bool, details: bool) -> RowFacts:
    """Measure one row.

    Args:
        rows: The data set.
        index: The row's number.
        decode: Whether its images and videos are decoded.
        details: Whether ``RowFacts.details`` is filled in (which decodes, too).
    """
    processing = rows.processing
    facts = RowFacts()
    try:
        row = rows.parse(index)
        facts = RowFacts(unknown_keys=row.unknown_keys)
        whole = processing.whole_plan(row.turns, rows.open_media(index, row.sources))
        limit = processing.arguments.model_max_length
        over = limit is not None and len(whole.encoded.input_ids) > limit
        if (
            over and whole.encoded.supervised
        ):  # whatever --overlength makes of it, a larger limit would hold it
            numbers = _numbers(rows, index, whole, kept=0)
            facts = replace(facts, numbers=numbers, lengths=_lengths(rows, whole))
        plan = processing.fit(whole)
        facts = replace(facts, numbers=None)  # what can go wrong from here on is not a matter of length
        line = _details(rows, index, processing.finish(plan)) if details else None
        if decode and not details:
            _decode(plan)
    except RowError as error:
        bad = rows.describe(index, error)
        line = json.dumps({**asdict(bad), "ok": False}, default=str) if details else None
        return replace(facts, bad=bad, dropped=isinstance(error, DroppedRowError), details=line)
    numbers = _numbers(rows, index, whole, kept=len(plan.encoded.input_ids))
    return replace(facts, numbers=numbers, lengths=_lengths(rows, whole), cut=over, details=line)


def _decode(plan: Plan) -> None:
    for picture in plan.pictures:
        for _ in picture.frames():
            pass


def _numbers(rows: TrainingRows, index: int, plan: Plan, *, kept: int) -> tuple[int, ...]:
    encoded = plan.encoded
    slices = [layout.count for frames in plan.layouts for layout in frames]
    media_tokens = sum(end - start for start, end in encoded.media_spans)
    audio_tokens = plan.encoded.audio_tokens
    return (
        len(encoded.input_ids),
        kept,
        media_tokens - audio_tokens,
        encoded.supervised,
        sum(isinstance(picture, Picture) for picture in plan.pictures),
        sum(slices),
        max((count - 1 for count in slices), default=0),
        rows.mixture.origin(index)[0],
        int(0 in encoded.input_ids and token_zero(rows.processing.tokenizer) is not None),
        audio_tokens,
        round(1000 * sum(clip.seconds for clip in plan.clips)),
        round(1000 * sum(video.seconds for video in plan.pictures if video.kind == "video")),
        sum(picture.kind == "image" for picture in plan.pictures),
        index,
    )


def token_zero(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The text of token id 0; None where it is a special token, which no text holds."""
    text = tokenizer.convert_ids_to_tokens(0)
    return None if 0 in tokenizer.added_tokens_decoder or 0 in tokenizer.all_special_ids else str(text)


def _lengths(rows: TrainingRows, plan: Plan) -> tuple[int, ...]:
    """The row's length with every limit of slices up to the present one; videos keep their frames' slices."""
    processing = rows.processing
    length = len(plan.encoded.input_ids)
    images = [
        (picture.sizes[0], frames[0])
        for picture, frames in zip(plan.pictures, plan.layouts, strict=True)
        if picture.kind == "image"
    ]
    between_rows = len(processing.tokenizer("</slice>\n<slice>", add_special_tokens=False)["input_ids"]) - 2
    present = sum(_tokens(layout, processing.style, between_rows) for _, layout in images)
    lengths = []
    for limit in range(1, processing.rules.max_slice_nums + 1):
        rules = processing.rules.limited(limit)
        then = sum(_tokens(rules.layout(*size), processing.style, between_rows) for size, _ in images)
        lengths.append(length - present + then)
    return tuple(lengths)


def _tokens(layout: ImageLayout, style: PlaceholderStyle, between_rows: int) -> int:
    """Tokens of an image's placeholder without its number; ``between_rows`` are those of a newline."""
    pads = sum(style.token_count(size) + style.tag_tokens for size in layout.tgt_sizes)
    if layout.grid is None or not style.slice_tag:
        return pads
    newlines = (layout.grid.rows - 1) * between_rows
    return pads + newlines + 2 * (style.slice_tag == "image")


def _details(rows: TrainingRows, index: int, sample: Sample) -> str:
    """The row as the model will see it, as one line of JSON."""
    source, row = rows.mixture.origin(index)
    value = rows.mixture.read(index)
    tensors: dict[str, Any] = dict(sample)
    keys = (
        "input_ids", "labels", "loss_weights", "image_bound", "tgt_sizes", "temporal_ids", "mm_token_type_ids",
        "audio_bound", "audio_segments",
    )  # fmt: skip
    entry = {
        "file": rows.mixture.names[source],
        "row": row,
        "id": value.get("id") if isinstance(value, dict) else None,
        "ok": True,
        **{key: tensors[key].tolist() for key in keys if key in tensors},
        "pixels": pixel_hashes(sample),
    }
    return json.dumps(entry, default=str)


def pixel_hashes(sample: Sample) -> list[dict[str, Any]]:
    """Shape and SHA-256 of every slice's uint8 pixels, in patch form ``[3, 14, 14 * L]``."""
    return [
        {"shape": list(strip.shape), "sha256": hashlib.sha256(strip.tobytes()).hexdigest()}
        for strip in patch_strips(sample)
    ]


@dataclass
class DataStatistics:
    """What was found in all rows.

    Attributes:
        numbers: ``COLUMNS`` of the rows that can be used, or could with a larger --model_max_length, int32 [N, 14].
        lengths: Their lengths by the limit of slices, int32 [N, M].
        bad: Rows with problems.
        row_count: All rows.
        usable: Rows that contribute.
        dropped: Rows left out by ``--overlength drop``.
        cut: Rows that ``--model_max_length`` cuts.
        unknown_keys: Key that nothing reads -> how many rows have it.
    """

    numbers: np.ndarray
    lengths: np.ndarray
    bad: list[BadRow] = field(default_factory=list)
    row_count: int = 0
    usable: int = 0
    dropped: int = 0
    cut: int = 0
    unknown_keys: Counter[str] = field(default_factory=Counter)

    def column(self, name: str) -> np.ndarray:
        """One of ``COLUMNS``, int32 [N]."""
        return self.numbers[:, COLUMNS.index(name)]


def collect(
    facts: Iterable[RowFacts], rows: TrainingRows, *, write: Callable[[str], object] | None
) -> DataStatistics:
    """Put the rows' facts together, keeping only numbers of the good ones.

    Args:
        facts: Every row's facts, in order.
        rows: The data set.
        write: Takes each row's details, when there are any.
    """
    count, most = rows.mixture.row_count, rows.processing.rules.max_slice_nums
    found = DataStatistics(
        np.zeros((count, len(COLUMNS)), np.int32), np.zeros((count, most), np.int32), row_count=count
    )
    measured = 0
    for one in facts:
        found.unknown_keys.update(one.unknown_keys)
        if one.numbers is not None:
            found.numbers[measured], found.lengths[measured] = one.numbers, one.lengths
            measured += 1
        if one.dropped:
            found.dropped += 1
        elif one.bad is not None:
            found.bad.append(one.bad)
        else:
            found.usable += 1
            found.cut += one.cut
        if write is not None and one.details is not None:
            write(one.details)
    found.numbers, found.lengths = found.numbers[:measured], found.lengths[:measured]
    return found


def samples_per_epoch(found: DataStatistics, rows: TrainingRows) -> tuple[int, int]:
    """Samples of an epoch that contribute, and the tokens they have after ``--model_max_length``.

    Where a file gives another number of samples than it has rows, both are what is expected on average.
    """
    kept, source = found.column("kept"), found.column("source")
    samples = tokens = 0.0
    for number, file in enumerate(rows.mixture.files):
        own = kept[source == number]
        times = file.samples / len(file.rows)
        samples += times * np.count_nonzero(own)
        tokens += times * own.sum(dtype=np.int64)
    return round(samples), round(tokens)


def recommended_length(found: DataStatistics) -> int:
    """The shortest ``--model_max_length``, in steps of 64 tokens, that holds 99 % of the rows whole."""
    if not len(found.numbers):
        return 64
    return max(int(-(-np.percentile(found.column("length"), 99, method="higher") // 64) * 64), 64)


def recommended_slices(found: DataStatistics, limit: int | None) -> int:
    """The largest useful limit of slices: 1 % of the rows reach it, and with it 99 % fit ``limit`` tokens."""
    if not len(found.numbers):
        return 1
    reached = max(int(np.percentile(found.column("most_slices"), 99, method="higher")), 1)
    if limit is None:
        return reached
    fitting = ((found.lengths <= limit).mean(axis=0) >= 0.99).nonzero()[0]
    # Where none fits, the text alone is too long.
    return min(reached, int(fitting.max()) + 1) if len(fitting) else reached


def padding_shares(lengths: np.ndarray, *, batch_size: int, capacity: int | None) -> dict[str, float]:
    """The expected share of padding, with one sample per row and with packing.

    Args:
        lengths: The samples' lengths, in tokens.
        batch_size: Rows that are padded to the same length.
        capacity: Longest packed row; None takes the longest sample.

    Returns:
        ``plain`` and ``packed``, each between 0 and 1.
    """
    if not len(lengths):
        return {"plain": 0.0, "packed": 0.0}
    order = np.random.default_rng(0).permutation(len(lengths))
    capacity = int(lengths.max() if capacity is None else min(capacity, max(lengths.sum(), 1)))
    lengths = np.minimum(lengths, capacity)
    mixed = lengths[order]
    mixed = mixed[: len(mixed) // batch_size * batch_size or len(mixed)]
    width = min(batch_size, len(mixed))
    padded = mixed.reshape(-1, width).max(axis=1).sum() * width
    packed = pack_in_windows(order.tolist(), lengths.tolist(), capacity=capacity, window=_PACKING_WINDOW)
    return {
        "plain": float(1 - mixed.sum() / padded),
        "packed": float(1 - lengths.sum() / (len(packed) * capacity)),
    }
