"""`uniform`: every example counts the same; keeps scores all the same, for comparison runs."""

import torch

from equipoise_server.rules.base import Statistics
from equipoise_server.rules.ema import EmaRule
from equipoise_server.rules.settings import EmaSettings
from equipoise_server.rules.visit import ONE


class Uniform(EmaRule[EmaSettings]):
    """r = 1. Contributions are optional: without them a step leaves the tables as they are."""

    name = "uniform"
    settings_type = EmaSettings

    @property
    def raw_range(self) -> tuple[int, int]:
        """1 alone."""
        return ONE, ONE

    def check(self, statistics: Statistics) -> None:
        """Any step will do."""

    def raw_weights(self, statistic: torch.Tensor) -> torch.Tensor:
        """1."""
        return torch.full_like(statistic, ONE, dtype=torch.int32)
