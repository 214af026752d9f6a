"""`exponentiated_gradient`: mirror descent on the log weight, with groups as ids close to DoGE and DoReMi."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from equipoise_server.rules.base import RuleError, Scalars, Statistics, TableState
from equipoise_server.rules.exponential import exponential
from equipoise_server.rules.scale import MAX_SCALED, MEAN_SQUARE
from equipoise_server.rules.settings import MIN_FLOOR, SignalSettings, number
from equipoise_server.rules.table import fixed_point
from equipoise_server.rules.visit import ONE, VisitRule


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


class ExponentiatedGradient(VisitRule[ExponentiatedGradientSettings]):
    """z ← (1-decay)·z + η·c, clipped to ±½|ln floor|; r = √floor·exp(z), so that r lies in [floor, 1]."""

    name = "exponentiated_gradient"
    settings_type = ExponentiatedGradientSettings
    statistic = "log_weight"

    @property
    def raw_range(self) -> tuple[int, int]:
        """The floor and 1."""
        return fixed_point(self._settings.floor, ONE), ONE

    def prepare(self, state: TableState, statistics: Statistics) -> Scalars:
        """The mean square to divide by: the running one, or that of the unit."""
        scalars, unit = super().prepare(state, statistics), self._settings.unit
        if not unit:
            return scalars
        largest = float(np.abs(self._rows(state, statistics)).max(initial=0.0))
        if largest > MAX_SCALED * unit:
            name = self.signal_name
            raise RuleError(name, f"{name} up to {largest:g}: rule {self.name} needs them below {MAX_SCALED:g} units")
        return {**scalars, MEAN_SQUARE: unit * unit}

    def advance(self, old: torch.Tensor, signal: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """The log weight after a visit; it starts from 0."""
        limit = -0.5 * math.log(self._settings.floor)
        moved = old * (1.0 - self._settings.decay) + signal * self._settings.learning_rate
        return moved.clamp(-limit, limit)

    def raw_weights(self, statistic: torch.Tensor) -> torch.Tensor:
        """√floor·exp(z), held in the range against the last rounding."""
        floor, top = self.raw_range
        raw = exponential(statistic) * (math.sqrt(self._settings.floor) * ONE)
        return raw.round().clamp(floor, top).to(torch.int32)
