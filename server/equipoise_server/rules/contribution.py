"""The scale of the rules from contributions, from which a surprising loss may take away."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from equipoise_server.rules.base import RuleError, Scalars, Statistics
from equipoise_server.rules.scale import PerRow, Scale, next_mean_square, running, scaled
from equipoise_server.rules.settings import FlooredEmaSettings, number
from equipoise_server.rules.signals import check_finite, check_length

LOSS_MEAN = "loss_mean"
"""Scalar: running mean of the steps' losses, nats; absent before the first step with rows."""
LOSS_VARIANCE = "loss_variance"
"""Scalar: running mean square of losses around it, nats²."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContributionSettings(FlooredEmaSettings):
    """Settings of the rules from the moving average of the contribution."""

    loss_penalty: float = number(0.0, low=0.0, high=100.0)
    """κ: what a loss one standard deviation above the mean takes from a contribution, in units of the contributions'
    running RMS; one below the mean gives as much. 0: losses are not read. For data with wrong labels or other noise:
    there losses tell noise apart where contributions, small ones above all, do not. Not tried where what is off the
    target is easy, and low losses mislead: leave it 0 there."""


def contribution(settings: ContributionSettings, *, rule: str) -> Scale:
    """c/RMS(c), less the penalty where there is one."""
    if not settings.loss_penalty:
        return Scale(rule=rule, decay=settings.rms_decay)
    return PenalisedScale(rule=rule, decay=settings.rms_decay, penalty=settings.loss_penalty)


class PenalisedScale(Scale):
    """c/RMS(c) - κ·(loss - mean)/deviation; mean and deviation run as the RMS does."""

    signals = ("contributions", "losses")

    def __init__(self, *, rule: str, decay: float, penalty: float) -> None:
        super().__init__(rule=rule, decay=decay)
        self._penalty = penalty

    def rows(self, statistics: Statistics, *, num_examples: int) -> NDArray[np.float32]:
        """The contributions, which come with one loss each."""
        if (losses := statistics.losses) is not None:
            check_length(losses, statistics, num_examples=num_examples, name="losses", rule=self.rule)
        return super().rows(statistics, num_examples=num_examples)

    def after(self, before: Scalars, signal: NDArray[np.float32], statistics: Statistics) -> Scalars:
        """The running mean square of contributions, and the running moments of losses."""
        return super().after(before, signal, statistics) | self._next_moments(before, statistics.losses)

    def scaled(
        self, signal: NDArray[np.float32], statistics: Statistics, scalars: Mapping[str, PerRow]
    ) -> NDArray[np.float64]:
        """The contributions in units of their running RMS, less the penalty."""
        values, losses = super().scaled(signal, statistics, scalars), statistics.losses
        if losses is None or not len(values):
            return values
        return values - self._penalty * scaled(
            losses.astype(np.float64) - scalars.get(LOSS_MEAN, 0.0),
            scalars.get(LOSS_VARIANCE, 0.0),
            name=LOSS_VARIANCE,
            rule=self.rule,
        )

    def check(self, scalars: Scalars) -> None:
        """Raises RuleError when they are not what `after` gives."""
        if not math.isfinite(mean := scalars.get(LOSS_MEAN, 0.0)):
            raise RuleError(LOSS_MEAN, f"{LOSS_MEAN} = {mean}: rule {self.rule} needs a finite number")
        scaled(np.zeros(0), scalars.get(LOSS_VARIANCE, 0.0), name=LOSS_VARIANCE, rule=self.rule)
        super().check(scalars)

    def _next_moments(self, before: Scalars, losses: NDArray[np.float32] | None) -> Scalars:
        if losses is None or not len(losses):
            return {name: before[name] for name in (LOSS_MEAN, LOSS_VARIANCE) if name in before}
        mean = float(losses.sum(dtype=np.float64)) / len(losses)
        if not math.isfinite(mean):
            check_finite(losses, name="losses", rule=self.rule)
        mean = running(before.get(LOSS_MEAN), mean, decay=self.decay)
        previous, centred = before.get(LOSS_VARIANCE, 0.0), losses.astype(np.float64) - mean
        variance = next_mean_square(previous, centred, decay=self.decay, name="losses", rule=self.rule)
        return {LOSS_MEAN: mean, LOSS_VARIANCE: variance}
