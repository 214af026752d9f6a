"""`ema_relu`: weight in proportion to the positive part of the moving average of the contribution."""

from dataclasses import dataclass

import torch

from equipoise_server.rules.contribution import ContributionRule, ContributionSettings
from equipoise_server.rules.settings import number


@dataclass(frozen=True, slots=True, kw_only=True)
class EmaReluSettings(ContributionSettings):
    """Settings of `ema_relu`."""

    saturation: float = number(1.0, low=1e-3, high=1e3)
    """Moving average at which the weight reaches its top, in units of the running RMS of contributions."""


class EmaRelu(ContributionRule[EmaReluSettings]):
    """r = floor + (1-floor)·min(relu(EMA)/saturation, 1). After Ren et al. 2018, with a memory and a bound."""

    name = "ema_relu"
    settings_type = EmaReluSettings

    def raw_weights(self, statistic: torch.Tensor) -> torch.Tensor:
        """Linear between the floor at 0 and the top at saturation."""
        floor, top = self.raw_range
        share = (statistic * (1.0 / self._settings.saturation)).clamp(0.0, 1.0)
        return (share * (top - floor)).round().to(torch.int32) + floor
