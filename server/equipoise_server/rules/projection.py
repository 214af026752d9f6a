"""Euclidean projection onto {floor <= w <= cap, mean 1}, in exact fixed point.

The projection of v is clip(v - τ, floor, cap) for the one τ that makes the mean 1. τ is found among integers, from
exact integer sums, so that the result does not depend on device, threads or where the search starts.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray

from equipoise_server.rules.sums import SPAN, spans

ONE = 1 << 32
"""The weight 1 in fixed point."""

_MAX_CAP = 1 << 20
_MAX_SUM = 1 << 62
_NEWTON_PASSES = 12
"""Newton's method ends after about five; past this many every second pass halves the bracket instead."""


def find_threshold(values: torch.Tensor, *, floor: int, cap: int, start: int = 0) -> int:
    """τ with Σ clip(values - τ, floor, cap) at least n·ONE, and below it for τ + 1 unless it is equal.

    The clipped values do not depend on `start`, and their mean exceeds 1 by less than one unit of 2^-32.

    Args:
        values: int64 [n], n >= 1, magnitudes below 2^60.
        floor: lower bound, in [0, ONE).
        cap: upper bound, above ONE.
        start: where to look first.
    """
    total = len(values) * ONE
    smallest, largest = (int(bound) for bound in torch.aminmax(values))
    low, high = smallest - cap, largest - floor + 1  # all at the cap, all at the floor
    threshold = min(max(start, low), high - 1)
    passes = 0
    while high - low > 1:
        excess = _clipped_sum(values, threshold, floor, cap) - total
        if excess == 0:
            return threshold
        # Raising τ by one lowers what is in (floor, cap]; lowering it raises what is in [floor, cap).
        side = int(excess > 0)
        moving = _count_between(values, threshold + floor + side, threshold + cap + side)
        if 0 < excess < moving:
            return threshold
        low, high = (threshold, high) if excess > 0 else (low, threshold)
        passes += 1
        newton = threshold + excess // moving if moving else low
        halving = not low < newton < high or (passes > _NEWTON_PASSES and passes % 2 == 0)
        threshold = (low + high) // 2 if halving else newton
    return low


def project(values: NDArray[np.float64], *, floor: float = 0.0, cap: float = math.inf) -> NDArray[np.float64]:
    """The nearest w to `values` with floor <= w <= cap and mean 1, to 2^-32.

    Args:
        values: float64 [n], finite, of any size.
        floor: lower bound, in [0, 1).
        cap: upper bound, above 1; min(cap, n) is at most 2^20.

    Raises:
        ValueError: a value is not finite or a bound is out of its range.
    """
    cap = min(cap, float(max(len(values), 2)))
    if not 0.0 <= floor < 1.0:
        raise ValueError(f"floor = {floor}: must be in [0, 1)")
    if not 1.0 < cap <= _MAX_CAP:
        raise ValueError(f"cap = {cap}: must be above 1, and min(cap, n) at most {_MAX_CAP}")
    if len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(f"values: must be finite and not empty, got {values!r}")
    # What lies 4·cap from the pivot is at a bound either way: cutting it off changes nothing and fits any value.
    near = np.clip(_minus(values, _pivot(values, floor, cap)), -4.0 * cap, 4.0 * cap)
    fixed = torch.from_numpy(np.rint(near * ONE).astype(np.int64))
    low, high = round(floor * ONE), round(cap * ONE)
    weights = (fixed - find_threshold(fixed, floor=low, cap=high)).clamp(low, high)
    return np.asarray(weights.double().numpy() / ONE, dtype=np.float64)


def _pivot(values: NDArray[np.float64], floor: float, cap: float) -> float:
    """A breakpoint of Σ clip(v - τ, floor, cap) within `cap` of its solution τ, up to where the sum is flat.

    Between two breakpoints the sum is linear, and either flat or at most `cap` wide. Everything is measured from a
    breakpoint, never added to one, so that values far larger than the weights lose nothing.
    """
    breakpoints = np.sort(np.concatenate((_minus(values, floor), _minus(values, cap))))

    def reaches(pivot: float, offset: float) -> bool:
        return bool(np.clip(_minus(values, pivot) - offset, floor, cap).sum() >= len(values))

    below, above = -1, len(breakpoints) - 1
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if reaches(breakpoints[middle], 0.0) else (below, middle)
    close = below < 0 or reaches(breakpoints[above], -cap)
    return float(breakpoints[above if close else below])


def _minus(values: NDArray[np.float64], offset: float) -> NDArray[np.float64]:
    with np.errstate(over="ignore"):  # an infinite distance is a far one
        return values - offset


def _clipped_sum(values: torch.Tensor, threshold: int, floor: int, cap: int) -> int:
    rows = min(_MAX_SUM // cap, SPAN)
    parts = [(values[span] - threshold).clamp_(floor, cap).sum() for span in spans(len(values), rows=rows)]
    return sum(torch.stack(parts).tolist())


def _count_between(values: torch.Tensor, low: int, high: int) -> int:
    """How many values are in [low, high)."""
    parts = [torch.count_nonzero((values[span] >= low) & (values[span] < high)) for span in spans(len(values))]
    return sum(torch.stack(parts).tolist())
