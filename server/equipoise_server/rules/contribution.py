"""Rules from the moving average of the contribution, which a surprising loss may lower."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from equipoise_server.rules.base import RuleError, Scalars, Statistics, TableState
from equipoise_server.rules.ema import FlooredEmaRule
from equipoise_server.rules.scale import PerRow, next_mean_square, running, scaled
from equipoise_server.rules.settings import FlooredEmaSettings, number
from equipoise_server.rules.signals import check_length
from equipoise_server.rules.slices import Slices

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


ContributionSettingsT = TypeVar("ContributionSettingsT", bound=ContributionSettings)


class ContributionRule(FlooredEmaRule[ContributionSettingsT]):
    """A rule whose signal is c/RMS(c) - κ·(loss - mean)/deviation; mean and deviation run as the RMS does."""

    def __init__(self, settings: ContributionSettingsT) -> None:
        super().__init__(settings)
        if settings.loss_penalty:
            self.signals = ("contributions", "losses")

    def prepare(self, state: TableState, statistics: Statistics) -> Scalars:
        """The running mean square of contributions; with a penalty also the running moments of losses."""
        scalars = super().prepare(state, statistics)
        return scalars | self._next_moments(state, statistics) if self._settings.loss_penalty else scalars

    def scaled(
        self, signal: NDArray[np.float32], statistics: Statistics, scalars: Mapping[str, PerRow]
    ) -> NDArray[np.float64]:
        """The contributions in units of their running RMS, less the penalty."""
        values = super().scaled(signal, statistics, scalars)
        penalty, losses = self._settings.loss_penalty, statistics.losses
        if not penalty or losses is None or not len(values):
            return values
        return values - penalty * scaled(
            losses.astype(np.float64) - scalars.get(LOSS_MEAN, 0.0),
            scalars.get(LOSS_VARIANCE, 0.0),
            name=LOSS_VARIANCE,
            rule=self.name,
        )

    def restore_slices(self, state: TableState) -> Slices[TableState]:
        """Checks the tables and scalars, and recomputes the exact sums, in slices."""
        if not math.isfinite(mean := state.scalars.get(LOSS_MEAN, 0.0)):
            raise RuleError(LOSS_MEAN, f"{LOSS_MEAN} = {mean}: rule {self.name} needs a finite number")
        scaled(np.zeros(0), state.scalars.get(LOSS_VARIANCE, 0.0), name=LOSS_VARIANCE, rule=self.name)
        return (yield from super().restore_slices(state))

    def _next_moments(self, state: TableState, statistics: Statistics) -> Scalars:
        losses, decay = statistics.losses, self._settings.rms_decay
        before = {name: state.scalars[name] for name in (LOSS_MEAN, LOSS_VARIANCE) if name in state.scalars}
        if losses is None or not len(losses):
            return before
        check_length(losses, statistics, num_examples=state.num_examples, name="losses", rule=self.name)
        mean = float(losses.sum(dtype=np.float64)) / len(losses)
        if not math.isfinite(mean):
            index = int(np.flatnonzero(~np.isfinite(losses))[0])
            raise RuleError("losses", f"losses[{index}] = {losses[index]}: rule {self.name} needs finite values")
        mean = running(before.get(LOSS_MEAN), mean, decay=decay)
        centred = losses.astype(np.float64) - mean
        variance = next_mean_square(before.get(LOSS_VARIANCE, 0.0), centred, decay=decay, name="losses", rule=self.name)
        return {LOSS_MEAN: mean, LOSS_VARIANCE: variance}
