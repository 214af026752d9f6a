"""The scale: what a rule reads of a step, over its running RMS, so that the signal's unit does not matter."""

import math
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from equipoise_server.rules.base import RuleError, Scalars, Statistics
from equipoise_server.rules.signals import check_finite, check_length

MEAN_SQUARE = "mean_square"
"""Scalar: running mean square of the signal, in its own unit squared; 0 or absent before the first non-zero step."""

MAX_SCALED = 1e12
"""No value over the running RMS is larger: decays end at 0.9999 and B below 2^40, so √(B/(1-decay)) is below 1.1e8."""

PerRow: TypeAlias = float | NDArray[np.float64]
"""One value for all rows, or one for each of them, [B]."""


class Scale:
    """Contributions in units of their running RMS; other scales differ in what they read, or add to it.

    Args:
        rule: whose scale it is, for errors.
        decay: per step of the running mean square.
    """

    signals: tuple[str, ...] = ("contributions",)
    """Statistics that are read."""
    signal_name: str = "contributions"
    """What the signal is called in errors."""

    def __init__(self, *, rule: str, decay: float) -> None:
        self.rule = rule
        self.decay = decay

    def read(self, statistics: Statistics) -> NDArray[np.float32] | None:
        """The signal of a step, float32 [B]; None where the trainer did not send it."""
        return statistics.contributions

    def rows(self, statistics: Statistics, *, num_examples: int) -> NDArray[np.float32]:
        """The signal, with one value per row; empty where the step has none. Raises RuleError where it does not fit."""
        signal = self.read(statistics)
        if signal is None:
            return np.zeros(0, np.float32)
        return check_length(signal, statistics, num_examples=num_examples, name=self.signal_name, rule=self.rule)

    def after(self, before: Scalars, signal: NDArray[np.float32], statistics: Statistics) -> Scalars:
        """The scalars with a step in them. Raises RuleError when a value is not finite."""
        previous = before.get(MEAN_SQUARE, 0.0)
        return {
            MEAN_SQUARE: next_mean_square(previous, signal, decay=self.decay, name=self.signal_name, rule=self.rule)
        }

    def scaled(
        self, signal: NDArray[np.float32], statistics: Statistics, scalars: Mapping[str, PerRow]
    ) -> NDArray[np.float64]:
        """The signal in units of its running RMS, float64 [B]: of one step, or of rows of many with scalars of each.

        Row-local: a row's value depends on its own statistics and scalars.
        """
        return scaled(signal, scalars.get(MEAN_SQUARE, 0.0), rule=self.rule)

    def check(self, scalars: Scalars) -> None:
        """Raises RuleError when they are not what `after` gives."""
        scaled(np.zeros(0), scalars.get(MEAN_SQUARE, 0.0), rule=self.rule)


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
        check_finite(signal, name=name, rule=rule)
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
