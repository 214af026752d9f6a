"""Exact sums of fixed-point tables: integers on the device, Python integers off it, one result whatever the order."""

from collections.abc import Iterator

import torch

from equipoise_server.rules.arrays import Array, namespace, sums

SPAN = 1 << 18
"""Rows per partial sum: temporaries fit the cache, and sums of products of two 21-bit limbs stay below 2^60."""

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
    parts = [_span_sums(raw[span].to(torch.int64)) for span in spans(len(raw))]
    columns = zip(*torch.stack(parts).tolist(), strict=True)
    count, low, high, low_square, cross, high_square = (sum(column) for column in columns)
    squares = low_square + (cross << (LIMB_BITS + 1)) + (high_square << (2 * LIMB_BITS))
    return count, low + (high << LIMB_BITS), squares


def change_sums(old: Array, new: Array) -> tuple[int, int, int]:
    """What `new` [B] in place of `old` [B] adds to the three sums; int32 entries, at most 2^30 or -1 in `old`."""
    xp = namespace(old)
    first = old >> 31  # -1 where never scored, else 0
    before, after = xp.asarray(old - first, dtype=xp.int64), xp.asarray(new, dtype=xp.int64)
    difference = after - before
    squares = difference * (after + before)  # below 2^61: summed in halves
    unseen, total, low, high = sums(first, difference, squares & _HALF_MASK, squares >> _HALF_BITS)
    return -unseen, total, low + (high << _HALF_BITS)


def product_sum(left: Array, right: Array) -> int:
    """Σ left·right of int32 entries [B] that are not negative."""
    xp = namespace(left)
    total = 0
    for span in spans(len(left)):
        products = xp.asarray(left[span], dtype=xp.int64) * xp.asarray(right[span], dtype=xp.int64)
        low, high = sums(products & _HALF_MASK, products >> _HALF_BITS)  # below 2^62: summed in halves
        total += low + (high << _HALF_BITS)
    return total


def _span_sums(raw: torch.Tensor) -> torch.Tensor:
    values = raw.clamp(min=0)
    low, high = values & _LIMB_MASK, values >> LIMB_BITS
    return _sums(raw >= 0, low, high, low * low, low * high, high * high)


def _sums(*values: torch.Tensor) -> torch.Tensor:
    """Sums of integer tensors as one int64 tensor: a single read brings them off the device."""
    return torch.stack([each.sum() for each in values])
