"""`ema_relu`: weight in proportion to the positive part of the moving average of the contribution."""

from dataclasses import dataclass

from equipoise_server.rules.contribution import ContributionSettings, contribution
from equipoise_server.rules.ema import moving_average
from equipoise_server.rules.settings import number
from equipoise_server.rules.visit import VisitRule
from equipoise_server.rules.weights import ramp


@dataclass(frozen=True, slots=True, kw_only=True)
class EmaReluSettings(ContributionSettings):
    """Settings of `ema_relu`."""

    saturation: float = number(1.0, low=1e-3, high=1e3)
    """Moving average at which the weight reaches its top, in units of the running RMS of contributions."""


def ema_relu(settings: EmaReluSettings) -> VisitRule:
    """r = floor + (1-floor)·min(relu(EMA)/saturation, 1). After Ren et al. 2018, with a memory and a bound."""
    return VisitRule(
        settings,
        scale=contribution(settings, rule="ema_relu"),
        advance=moving_average(settings.ema_decay),
        raw_weights=ramp(0.0, width=settings.saturation, floor=settings.floor),
        floor=settings.floor,
    )
