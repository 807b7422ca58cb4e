"""Packing: several samples share one row, so that few places of a row are padding.

Samples are put together by their lengths, longest first, each into the fullest row it still fits
(best fit), within a window of the shuffled order. Attention, recurrent state and positions stay
within a sample; the model tells samples apart by ``position_ids`` that restart at 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Lengths = Sequence[int] | np.ndarray  # tokens of every sample, by number


def best_fit(indices: Sequence[int], lengths: Lengths, *, capacity: int) -> list[tuple[int, ...]]:
    """Put samples into as few rows as best fit, longest first, finds.

    Args:
        indices: The samples' numbers.
        lengths: Length of every sample of the data set, by number, in tokens.
        capacity: Longest row, in tokens. A longer sample gets a row of its own.

    Returns:
        Rows, each the numbers of its samples; every index is in exactly one.

    Example:
        >>> best_fit([0, 1, 2, 3], [60, 50, 40, 50], capacity=100)
        [(0, 2), (1, 3)]
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # free tokens -> rows that have so many
    occupied = 0  # bit n is set while with_room[n] has a row; its lowest bits are found in one step
    for index in sorted(indices, key=lambda index: -lengths[index]):
        # int(): a numpy length would turn the bit mask into a 64-bit number.
        length = min(int(lengths[index]), capacity)
        fitting = occupied >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                occupied &= ~(1 << room)
            rows[row].append(index)
        else:
            room, row = capacity, len(rows)
            rows.append([index])
        left = room - length
        if left:
            with_room.setdefault(left, []).append(row)
            occupied |= 1 << left
    return [tuple(row) for row in rows]


def pack_in_windows(
    order: Sequence[int], lengths: Lengths, *, capacity: int, window: int
) -> list[tuple[int, ...]]:
    """Pack a shuffled order, window by window.

    Args:
        order: Numbers of the samples, shuffled.
        lengths: See ``best_fit``.
        capacity: See ``best_fit``.
        window: Samples that are put together at a time.
    """
    starts = range(0, len(order), window)
    return [
        row for start in starts for row in best_fit(order[start : start + window], lengths, capacity=capacity)
    ]
