"""Moving averages of the signal: the statistic of most rules."""

from typing import TypeVar

import torch

from equipoise_server.rules.settings import EmaSettings, FlooredEmaSettings
from equipoise_server.rules.table import fixed_point
from equipoise_server.rules.visit import ONE, VisitRule

EmaSettingsT = TypeVar("EmaSettingsT", bound=EmaSettings)
FlooredEmaSettingsT = TypeVar("FlooredEmaSettingsT", bound=FlooredEmaSettings)


def moving_average(old: torch.Tensor, new: torch.Tensor, first: torch.Tensor, *, decay: float) -> torch.Tensor:
    """decay·old + (1-decay)·new, or `new` at the first visit; three roundings per row, none shared between rows."""
    return torch.where(first, new, old * decay + new * (1.0 - decay))


class EmaRule(VisitRule[EmaSettingsT]):
    """A rule whose statistic is the moving average of the signal over visits, in units of the running RMS."""

    def advance(self, old: torch.Tensor, signal: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """The moving average after a visit."""
        return moving_average(old, signal, first, decay=self._settings.ema_decay)


class FlooredEmaRule(EmaRule[FlooredEmaSettingsT]):
    """A moving average mapped into [floor, 1]."""

    @property
    def raw_range(self) -> tuple[int, int]:
        """The floor and 1."""
        return fixed_point(self._settings.floor, ONE), ONE
