"""The running mean square of a signal, which makes a rule independent of the signal's scale."""

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from equipoise_server.rules.base import RuleError

MEAN_SQUARE = "mean_square"
"""Scalar: running mean square of the signal, in its own unit squared; 0 or absent before the first non-zero step."""

MAX_SCALED = 1e12
"""No value over the running RMS is larger: decays end at 0.9999 and B below 2^40, so √(B/(1-decay)) is below 1.1e8."""


PerRow: TypeAlias = float | NDArray[np.float64]
"""One value for all rows, or one for each of them, [B]."""


def running(previous: float | None, value: float, *, decay: float) -> float:
    """decay·previous + (1-decay)·value, or `value` where there is nothing before it."""
    return value if previous is None else decay * previous + (1.0 - decay) * value


def next_mean_square(previous: float, signal: NDArray[np.floating], *, decay: float, name: str, rule: str) -> float:
    """Running mean square with this step's B values included; the first step that is not all zero initialises it.

    Squares of float32 are exact in float64, and numpy adds them pairwise in one thread: the number of threads cannot
    change the result.

    Raises:
        RuleError: a value is not finite.
    """
    if signal.size == 0:
        return previous
    mean_square = float(np.square(signal, dtype=np.float64).sum()) / signal.size
    if not math.isfinite(mean_square):
        index = int(np.flatnonzero(~np.isfinite(signal))[0])
        raise RuleError(name, f"{name}[{index}] = {signal[index]}: rule {rule} needs finite values")
    return running(previous or None, mean_square, decay=decay)


def scaled(
    signal: NDArray[np.floating], mean_square: PerRow, *, rule: str, name: str = MEAN_SQUARE, clip: bool = False
) -> NDArray[np.float64]:
    """The signal over its running RMS, float64 [B]; zeros while the mean square is unset.

    Divided here rather than on the device, where a division by a constant becomes a product with its reciprocal.

    Args:
        signal: finite, [B].
        mean_square: its running mean square.
        rule: name of the rule, for errors.
        name: name of the mean square, for errors.
        clip: whether what is beyond ±`MAX_SCALED` is held there; else it is refused.

    Raises:
        RuleError: the mean square is not a finite number >= 0, or too small to belong to this signal.
    """
    values = signal.astype(np.float64)
    if isinstance(mean_square, np.ndarray):
        if not ((mean_square >= 0.0) & (mean_square < math.inf)).all():
            raise RuleError(name, f"{name}: rule {rule} needs finite numbers >= 0")
        values /= np.sqrt(np.where(mean_square > 0.0, mean_square, 1.0))
    elif 0.0 < mean_square < math.inf:
        values /= math.sqrt(mean_square)
    elif mean_square != 0.0:
        raise RuleError(name, f"{name} = {mean_square}: rule {rule} needs a finite number >= 0")
    if clip:
        return values.clip(-MAX_SCALED, MAX_SCALED)
    if values.size and not max(values.max(), -values.min()) <= MAX_SCALED:
        raise RuleError(name, f"{name} = {mean_square} does not belong to this step of rule {rule}")
    return values
