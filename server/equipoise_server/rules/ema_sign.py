"""`ema_sign`: full weight where the moving average of the contribution is positive, else the floor."""

from dataclasses import dataclass

import torch

from equipoise_server.rules.contribution import ContributionRule, ContributionSettings
from equipoise_server.rules.settings import number


@dataclass(frozen=True, slots=True, kw_only=True)
class EmaSignSettings(ContributionSettings):
    """Settings of `ema_sign`."""

    threshold: float = number(0.0, low=-1e3, high=1e3)
    """What the moving average must exceed for full weight, in units of the running RMS of contributions."""


class EmaSign(ContributionRule[EmaSignSettings]):
    """r = 1 where EMA > threshold, else the floor. The Learning Law's sign alone: robust to the size of outliers."""

    name = "ema_sign"
    settings_type = EmaSignSettings

    def raw_weights(self, statistic: torch.Tensor) -> torch.Tensor:
        """1 or the floor."""
        floor, top = self.raw_range
        above = (statistic > self._settings.threshold).to(torch.int32)
        return above * (top - floor) + floor
