"""Rules whose steps change only the rows they visit: O(B), whatever N is."""

from abc import abstractmethod

import numpy as np
import torch
from numpy.typing import NDArray

from equipoise_server.rules.base import Scalars, Statistics, TableState
from equipoise_server.rules.settings import SignalSettingsT
from equipoise_server.rules.sums import change_sums
from equipoise_server.rules.table import RAW, TableRule, gather, scatter

ONE = 1 << 30
"""The raw weight 1: int32 holds [0, 1] in steps of 2^-30."""


class VisitRule(TableRule[SignalSettingsT]):
    """A table rule whose raw weight in [floor, 1] follows from the example's statistic alone."""

    raw_dtype = torch.int32

    @abstractmethod
    def raw_weights(self, statistic: torch.Tensor) -> torch.Tensor:
        """Raw weights, int32 [B] in `raw_range`, for statistics float64 [B]."""

    def apply(
        self, state: TableState, statistics: Statistics, scalars: Scalars, *, pages: NDArray[np.bool_] | None = None
    ) -> TableState:
        """Moves the statistic and the raw weight of the step's rows."""
        index, signal = self._located(state, statistics, scalars, pages)
        if len(signal):
            old_raw = gather(state.columns[RAW], index)
            statistic = self._advanced(state, index, signal, old_raw < 0)
            new_raw = self.raw_weights(statistic.double())
            scored, total, squares = change_sums(old_raw, new_raw)
            scatter(state.columns[self.statistic], index, statistic)
            scatter(state.columns[RAW], index, new_raw)
            state.scored += scored
            state.raw_sum += total
            state.raw_square_sum += squares
        state.scalars = dict(scalars)
        return state

    def _weight_per_raw(self, state: TableState) -> float | None:
        return state.scored / state.raw_sum if state.raw_sum else None

    def _weight_sums(self, state: TableState) -> tuple[float, float]:
        if not state.raw_sum:
            return float(state.scored), float(state.scored)
        return float(state.scored), state.scored**2 * state.raw_square_sum / state.raw_sum**2
