"""`exponentiated_gradient`: mirror descent on the log weight, with groups as ids close to DoGE and DoReMi."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from equipoise_server.rules.arrays import Array, namespace
from equipoise_server.rules.base import RuleError, Scalars, Statistics
from equipoise_server.rules.exponential import exponential
from equipoise_server.rules.scale import MAX_SCALED, MEAN_SQUARE, Scale
from equipoise_server.rules.settings import MIN_FLOOR, SignalSettings, number
from equipoise_server.rules.visit import VisitRule
from equipoise_server.rules.weights import ONE, fixed_point


@dataclass(frozen=True, slots=True, kw_only=True)
class ExponentiatedGradientSettings(SignalSettings):
    """Settings of `exponentiated_gradient`."""

    learning_rate: float = number(0.1, low=1e-6, high=10.0)
    """η: what a contribution of one unit adds to the log weight."""

    decay: float = number(0.01, low=0.0, high=1.0)
    """Share of the log weight that a visit forgets."""

    floor: float = number(0.01, low=MIN_FLOOR, high=1.0)
    """Smallest raw weight; 1/floor bounds the ratio of two weights."""

    unit: float = number(0.0, low=1e-6, high=1e6, or_zero=True)
    """One unit of contributions; 0: their running RMS, so that their scale does not matter. For trainers that scale
    contributions themselves and send small ones where these say little: the running RMS would undo it."""


class UnitScale(Scale):
    """Contributions in a unit that was set."""

    def __init__(self, *, rule: str, decay: float, unit: float) -> None:
        super().__init__(rule=rule, decay=decay)
        self._unit = unit

    def after(self, before: Scalars, signal: NDArray[np.float32], statistics: Statistics) -> Scalars:
        """The unit's square, for contributions that it fits."""
        super().after(before, signal, statistics)  # refuses what is not finite
        largest = float(np.abs(signal).max(initial=0.0))
        if largest > MAX_SCALED * self._unit:
            text = f"{self.signal_name} up to {largest:g}: rule {self.rule} needs them below {MAX_SCALED:g} units"
            raise RuleError(self.signal_name, text)
        return {MEAN_SQUARE: self._unit * self._unit}


def exponentiated_gradient(settings: ExponentiatedGradientSettings) -> VisitRule:
    """z ← (1-decay)·z + η·c, clipped to ±½|ln floor|; r = √floor·exp(z), so that r lies in [floor, 1]."""
    rule, unit, decay = "exponentiated_gradient", settings.unit, settings.rms_decay
    limit, low = -0.5 * math.log(settings.floor), fixed_point(settings.floor)

    def advance(old: Array, signal: Array, first: Array) -> Array:
        """The log weight starts from 0."""
        moved = old * (1.0 - settings.decay) + signal * settings.learning_rate
        return namespace(old).clip(moved, -limit, limit)

    def raw_weights(statistic: Array) -> Array:
        """√floor·exp(z), held in the range against the last rounding."""
        xp = namespace(statistic)
        return xp.clip(xp.round(exponential(statistic) * (math.sqrt(settings.floor) * ONE)), low, ONE)

    return VisitRule(
        settings,
        scale=UnitScale(rule=rule, decay=decay, unit=unit) if unit else Scale(rule=rule, decay=decay),
        advance=advance,
        raw_weights=raw_weights,
        floor=settings.floor,
        statistic="log_weight",
    )
