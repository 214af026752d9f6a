"""`loss_linear_upper`: from losses alone, low-loss examples of a step count less."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from equipoise_server.rules.base import Scalars, TableState
from equipoise_server.rules.batch import BatchRule
from equipoise_server.rules.settings import RuleSettings, number
from equipoise_server.rules.signals import check_finite

STEPS = "batch_steps"
"""Scalar: how many steps with rows there were."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossLinearUpperSettings(RuleSettings):
    """Settings of `loss_linear_upper`."""

    temperature: float = number(1.0, low=0.05, high=1e3)
    """r: two weights of one step differ by exp(1/r) at most."""

    burn_in: float = number(0.0, low=0.0, high=1e9)
    """The first so many steps are uniform: losses say little before the model has learned anything."""


class LossLinearUpper(BatchRule[LossLinearUpperSettings]):
    """w ∝ exp(f/r), f rising linearly from 0 at the lowest loss of the step to 1 half-way to the highest, then flat.

    LinUpper of Sow et al. 2025 (arXiv 2502.06733): h = affine(loss) onto [-δ, δ], f = min(h + δ, δ); only δ/r matters,
    so δ is 1 here. What is learned counts less; outliers count no more than the upper half.
    """

    name = "loss_linear_upper"
    sparse_contributions = True
    signals = ("losses",)

    def scale(self, state: TableState, signal: NDArray[np.float32]) -> Scalars:
        """The number of steps with this one included."""
        check_finite(signal, name="losses", rule=self.name)
        return {STEPS: state.scalars.get(STEPS, 0.0) + (1.0 if len(signal) else 0.0)}

    def logits(self, signal: NDArray[np.float32], scalars: Scalars, *, clip: bool = False) -> NDArray[np.float64]:
        """f/r."""
        losses = signal.astype(np.float64)
        lowest, highest = losses.min(), losses.max()
        if lowest == highest or scalars.get(STEPS, 0.0) <= self._settings.burn_in:
            return np.zeros(len(losses))
        share: NDArray[np.float64] = (losses - lowest) / ((highest - lowest) * 0.5)
        return share.clip(max=1.0) * (1.0 / self._settings.temperature)
