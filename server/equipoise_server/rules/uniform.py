"""`uniform`: every example counts the same; keeps scores all the same, for comparison runs."""

from equipoise_server.rules.arrays import namespace
from equipoise_server.rules.ema import moving_average
from equipoise_server.rules.scale import Scale
from equipoise_server.rules.settings import EmaSettings
from equipoise_server.rules.visit import VisitRule
from equipoise_server.rules.weights import ONE


def uniform(settings: EmaSettings) -> VisitRule:
    """r = 1. Contributions are optional: without them a step leaves the tables as they are."""
    return VisitRule(
        settings,
        scale=Scale(rule="uniform", decay=settings.rms_decay),
        advance=moving_average(settings.ema_decay),
        raw_weights=lambda statistic: namespace(statistic).full_like(statistic, ONE),
        floor=1.0,
        optional=True,
    )
