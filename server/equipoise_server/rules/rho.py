"""`rho`: weight by reducible loss, what the model still misses of what a reference model knows."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from equipoise_server.rules.base import Statistics
from equipoise_server.rules.ema import moving_average
from equipoise_server.rules.scale import Scale
from equipoise_server.rules.settings import FlooredEmaSettings, number
from equipoise_server.rules.signals import reducible_losses
from equipoise_server.rules.visit import VisitRule
from equipoise_server.rules.weights import ramp


@dataclass(frozen=True, slots=True, kw_only=True)
class RhoSettings(FlooredEmaSettings):
    """Settings of `rho`."""

    threshold: float = number(0.0, low=-1e3, high=1e3)
    """Moving average up to which the weight is the floor, in units of the running RMS of reducible losses."""

    saturation: float = number(1.0, low=1e-3, high=1e3)
    """How far above the threshold the weight reaches its top, in the same units; 0.001: nearly a step."""


class ReducibleLoss(Scale):
    """loss - reference_loss, nats, in units of its running RMS."""

    signals = ("losses", "reference_losses")
    signal_name = "losses - reference_losses"

    def read(self, statistics: Statistics) -> NDArray[np.float32] | None:
        """loss - reference_loss, nats."""
        return reducible_losses(statistics)


def rho(settings: RhoSettings) -> VisitRule:
    """r = floor + (1-floor)·min(relu(EMA - threshold)/saturation, 1), EMA of loss - reference_loss.

    After RHO-loss (Mindermann et al. 2022, arXiv 2206.07137): an example is worth training on where its loss is above
    that of a reference model which has learned the desired distribution. Noise is hard for both, what is learned is
    easy for both, and what is off the target is hard for the reference alone: all three get the floor. The paper
    trains on the highest of a batch; here the memory decides, example by example. Reference losses come with every
    step, so that they may be kept by the trainer or computed as it goes.
    """
    return VisitRule(
        settings,
        scale=ReducibleLoss(rule="rho", decay=settings.rms_decay),
        advance=moving_average(settings.ema_decay),
        raw_weights=ramp(settings.threshold, width=settings.saturation, floor=settings.floor),
        floor=settings.floor,
    )
