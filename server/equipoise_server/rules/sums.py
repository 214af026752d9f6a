"""Exact sums of fixed-point tables: integers on the device, Python integers off it, one result whatever the order."""

from collections.abc import Iterator

import torch

SPAN = 1 << 20
"""Rows per partial sum: 2^20 products of two 21-bit limbs stay below 2^62."""

LIMB_BITS = 21
MAX_RAW = 1 << (2 * LIMB_BITS)
"""Fixed-point values that `table_sums` adds are below this."""

_LIMB_MASK = (1 << LIMB_BITS) - 1
_HALF_BITS = 30
_HALF_MASK = (1 << _HALF_BITS) - 1


def spans(num_rows: int, *, rows: int = SPAN) -> Iterator[slice]:
    """Slices of at most `rows` rows that cover a table."""
    return (slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows))


def table_sums(raw: torch.Tensor) -> tuple[int, int, int]:
    """Number, sum and sum of squares of the entries of `raw` [N] that are not -1; they are below 2^42."""
    count = total = squares = 0
    for span in spans(len(raw)):
        piece = raw[span].to(torch.int64)
        values = piece.clamp(min=0)
        high, low = values >> LIMB_BITS, values & _LIMB_MASK
        parts = torch.stack((piece >= 0, high, low, high * high, high * low, low * low)).sum(dim=1)
        num, high_sum, low_sum, high_square, cross, low_square = parts.tolist()
        count += num
        total += (high_sum << LIMB_BITS) + low_sum
        squares += (high_square << (2 * LIMB_BITS)) + (cross << (LIMB_BITS + 1)) + low_square
    return count, total, squares


def change_sums(old: torch.Tensor, new: torch.Tensor) -> tuple[int, int, int]:
    """What `new` [B] in place of `old` [B] adds to the three sums; int32 entries, at most 2^30 or -1 in `old`."""
    first = old >> 31  # -1 where never scored, else 0
    before, after = (old - first).to(torch.int64), new.to(torch.int64)
    difference = after - before
    squares = difference * (after + before)  # below 2^61: summed in halves
    parts = torch.stack((first, difference, squares >> _HALF_BITS, squares & _HALF_MASK)).sum(dim=1)
    unseen, total, high, low = parts.tolist()
    return -unseen, total, (high << _HALF_BITS) + low
