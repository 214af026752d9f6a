"""Rules whose steps change only the rows they visit: O(B), whatever N is."""

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from equipoise_server.rules.base import LoggedStatistics, RuleError, Scalars, Statistics, TableState
from equipoise_server.rules.settings import SignalSettingsT
from equipoise_server.rules.sums import change_sums
from equipoise_server.rules.table import RAW, TableRule, gather, on_device, scatter
from equipoise_server.rules.visits import Visits, by_visit, join, runs

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
            self._write(state, index, old_raw, statistic)
        state.scalars = dict(scalars)
        return state

    def replay(self, state: TableState, steps: Sequence[LoggedStatistics]) -> TableState:
        """The policy after these steps, their rows joined.

        A row's way does not depend on other rows: all first visits of the examples are made at once, then all second
        ones, ...; raw weights and sums follow from where the statistics end. There are never more rounds than steps.
        """
        for run in runs(steps):
            visits = self._visits(state, run) if len(run) > 1 else None
            if visits is None:
                state = super().replay(state, run)
            else:
                self._visit(state, visits)
                state.scalars = dict(run[-1].scalars)
        return state

    def _visits(self, state: TableState, steps: Sequence[LoggedStatistics]) -> Visits | None:
        """The visits of several steps; None: they cannot be joined, or `apply` will refuse one of them."""
        told = []
        for step in steps:
            if step.statistics.size:
                told.append(step)
            else:  # it changes no row, but its scalars may be impossible
                self.apply(state, step.statistics, step.scalars)
        if not told:
            return None
        try:
            joined = join(told, signals=self.signals, rule=self.name)
            signal = self._rows(state, joined.statistics)
            return by_visit(joined.ids, self.scaled(signal, joined.statistics, joined.scalars), kept=joined.kept)
        except (RuleError, IndexError):
            return None

    def _visit(self, state: TableState, visits: Visits) -> None:
        index = on_device(state.device, visits.ids)
        old_raw = gather(state.columns[RAW], index)
        statistic = gather(state.columns[self.statistic], index)  # a copy
        first = old_raw < 0
        signal = torch.from_numpy(visits.signal).to(state.device)
        start = 0
        for size in visits.sizes:
            moved = self.advance(statistic[:size].double(), signal[start : start + size], first[:size])
            statistic[:size] = moved  # rounded after every visit, as the table does
            first[:size] = False
            start += size
        self._write(state, index, old_raw, statistic)

    def _write(
        self, state: TableState, index: torch.Tensor | None, old_raw: torch.Tensor, statistic: torch.Tensor
    ) -> None:
        """Puts the rows' new statistics, float32 [B], and the raw weights that follow from them into the tables."""
        new_raw = self.raw_weights(statistic.double())
        scored, total, squares = change_sums(old_raw, new_raw)
        scatter(state.columns[self.statistic], index, statistic)
        scatter(state.columns[RAW], index, new_raw)
        state.scored += scored
        state.raw_sum += total
        state.raw_square_sum += squares

    def _weight_per_raw(self, state: TableState) -> float | None:
        return state.scored / state.raw_sum if state.raw_sum else None

    def _weight_sums(self, state: TableState) -> tuple[float, float]:
        if not state.raw_sum:
            return float(state.scored), float(state.scored)
        return float(state.scored), state.scored**2 * state.raw_square_sum / state.raw_sum**2
