"""`ema_sign`: full weight where the moving average of the contribution is positive, else the floor."""

from dataclasses import dataclass

from equipoise_server.rules.contribution import ContributionSettings, contribution
from equipoise_server.rules.ema import moving_average
from equipoise_server.rules.settings import number
from equipoise_server.rules.visit import VisitRule
from equipoise_server.rules.weights import threshold


@dataclass(frozen=True, slots=True, kw_only=True)
class EmaSignSettings(ContributionSettings):
    """Settings of `ema_sign`."""

    threshold: float = number(0.0, low=-1e3, high=1e3)
    """What the moving average must exceed for full weight, in units of the running RMS of contributions."""


def ema_sign(settings: EmaSignSettings) -> VisitRule:
    """r = 1 where EMA > threshold, else the floor. The Learning Law's sign alone: robust to the size of outliers."""
    return VisitRule(
        settings,
        scale=contribution(settings, rule="ema_sign"),
        advance=moving_average(settings.ema_decay),
        raw_weights=threshold(settings.threshold, floor=settings.floor),
        floor=settings.floor,
    )
