"""`boltzmann`: a softmax of the contributions of a step."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from equipoise_server.rules.base import Scalars, TableState
from equipoise_server.rules.batch import BatchRule
from equipoise_server.rules.scale import MEAN_SQUARE, next_mean_square, scaled
from equipoise_server.rules.settings import SignalSettings, number


@dataclass(frozen=True, slots=True, kw_only=True)
class BoltzmannSettings(SignalSettings):
    """Settings of `boltzmann`."""

    temperature: float = number(1.0, low=0.01, high=1e3)
    """τ, in units of the running RMS of contributions: high is uniform, low is the largest alone."""


class Boltzmann(BatchRule[BoltzmannSettings]):
    """w ∝ exp(c/τ) over the step, c over its running RMS.

    What OPUS (arXiv 2602.05400) samples by and what GREATS (Wang et al. 2024) picks the top of, as weights; neither
    the interactions within a batch nor the sampling.
    """

    name = "boltzmann"
    signals = ("contributions",)

    def scale(self, state: TableState, signal: NDArray[np.float32]) -> Scalars:
        """The running mean square with this step included."""
        previous, decay = state.scalars.get(MEAN_SQUARE, 0.0), self._settings.rms_decay
        return {MEAN_SQUARE: next_mean_square(previous, signal, decay=decay, name=self.signals[0], rule=self.name)}

    def logits(self, signal: NDArray[np.float32], scalars: Scalars, *, clip: bool = False) -> NDArray[np.float64]:
        """c/τ."""
        values = scaled(signal, scalars.get(MEAN_SQUARE, 0.0), rule=self.name, clip=clip)
        return values * (1.0 / self._settings.temperature)
