"""Euclidean projection of one row onto the simplex, {w >= 0, mean 1}: exact, with exact zeros, and fast.

The projection of v is max(v - τ, 0) for the one τ that makes the mean 1. As in `projection`, τ is found among integers
from exact integer sums, so that neither threads nor machines change the result; without a cap Newton's method needs no
bracket and takes a few passes.
"""

import numpy as np
from numpy.typing import NDArray

MAX_EXAMPLES = 1 << 20
"""Longest row: above it the fixed-point unit would be coarser than float32 weights are."""

_SUM_BITS = 62
_MAX_UNIT_BITS = 40


def project_simplex(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest w to `values` with w >= 0 and mean 1, to the unit 2^-min(40, 62 - 2·⌈log2 n⌉).

    Args:
        values: float64 [n], finite, 1 <= n <= `MAX_EXAMPLES`.
    """
    size = len(values)
    unit = 1 << min(_MAX_UNIT_BITS, _SUM_BITS - 2 * (size - 1).bit_length())
    total = size * unit
    # The largest w is at most n, so that τ >= max - n: what lies n below the largest value is 0 and may be cut off.
    below = np.maximum(values - values.max(), -float(size))
    fixed = np.rint(below * unit).astype(np.int64)
    return _weights(fixed, total) / unit


def _weights(fixed: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """max(v - τ, 0) for the largest τ with a sum of at least `total`; that sum exceeds it by less than one unit each.

    Newton's method on the sum, which is convex and falls with τ: started where the sum is too large it never passes
    the solution. It stands still exactly where one unit more would take more than the excess: there τ is largest.

    Args:
        fixed: int64 [n], at most 0, the largest 0, none below -total.
        total: n times the unit; n times it fits 62 bits.
    """
    threshold = max((int(fixed.sum()) - total) // len(fixed), -total)  # as if none were 0
    weights = np.empty_like(fixed)
    while True:
        np.subtract(fixed, threshold, out=weights)
        np.maximum(weights, 0, out=weights)
        step = (int(weights.sum()) - total) // int(np.count_nonzero(weights))
        if step == 0:
            return weights
        threshold += step
