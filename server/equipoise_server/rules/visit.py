"""Rules whose steps change only the rows they visit, O(B) whatever N is: made of a scale, a statistic and a map."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from equipoise_server.rules.arrays import Array, gather, namespace, rows_of, scatter, there
from equipoise_server.rules.base import LoggedStatistics, RuleError, Scalars, Statistics, TableState
from equipoise_server.rules.scale import Scale
from equipoise_server.rules.settings import RuleSettings
from equipoise_server.rules.sums import change_sums
from equipoise_server.rules.table import TableRule
from equipoise_server.rules.visits import Visits, by_visit, join, runs
from equipoise_server.rules.weights import ONE, WeightMap, fixed_point


class VisitRule(TableRule):
    """A table rule whose raw weight in [floor, 1] follows from the example's statistic alone.

    Args:
        settings: of the rule.
        scale: what is read of a step, in a unit of its own.
        advance: the statistic after a visit, float64 [B], from the one before it (float64 [B], 0 where never scored),
            the scaled signal (float64 [B]), and whether it is the first visit (bool [B]).
        raw_weights: from the statistic to the raw weight.
        floor: smallest weight.
        statistic: column of the statistic.
        optional: whether a step may come without the signal, and then changes no table.
    """

    raw_dtype = torch.int32

    def __init__(
        self,
        settings: RuleSettings,
        *,
        scale: Scale,
        advance: Callable[[Array, Array, Array], Array],
        raw_weights: WeightMap,
        floor: float,
        statistic: str = "ema",
        optional: bool = False,
    ) -> None:
        super().__init__(settings, scale=scale, statistic=statistic)
        self._advance = advance
        self._raw_weights = raw_weights
        self._optional = optional
        self.raw_range = fixed_point(floor), ONE

    def advance(self, old: Array, signal: Array, first: Array) -> Array:
        """The statistic after a visit; see `VisitRule`."""
        return self._advance(old, signal, first)

    def check(self, statistics: Statistics) -> None:
        """Raises RuleError when the step has rows but not the rule's signals."""
        if not self._optional:
            super().check(statistics)

    def apply(
        self, state: TableState, statistics: Statistics, scalars: Scalars, *, pages: NDArray[np.bool_] | None = None
    ) -> TableState:
        """Moves the statistic and the raw weight of the step's rows."""
        ids, signal = self._located(state, statistics, scalars, pages)
        if len(signal):
            raw, column = tables = self._tables(state)
            rows = rows_of(raw, ids)
            old_raw = gather(raw, rows)
            statistic = self._advanced(gather(column, rows), there(raw, signal), old_raw < 0)
            self._write(state, tables, rows, old_raw, statistic)
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
            signal = self._scale.rows(joined.statistics, num_examples=state.num_examples)
            scaled = self._scale.scaled(signal, joined.statistics, joined.scalars)
            return by_visit(joined.ids, scaled, kept=joined.kept)
        except (RuleError, IndexError):
            return None

    def _visit(self, state: TableState, visits: Visits) -> None:
        raw, column = tables = self._tables(state)
        rows, signal = rows_of(raw, visits.ids), there(raw, visits.signal)
        old_raw, statistic = gather(raw, rows), gather(column, rows)
        first = old_raw < 0
        start = 0
        for size in visits.sizes:
            statistic[:size] = self._advanced(statistic[:size], signal[start : start + size], first[:size])
            first[:size] = False
            start += size
        self._write(state, tables, rows, old_raw, statistic)

    def _write(
        self, state: TableState, tables: tuple[Array, Array], rows: Array | None, old_raw: Array, statistic: Array
    ) -> None:
        """Puts the rows' new statistics, float32 [B], and the raw weights that follow from them into the tables."""
        xp = namespace(statistic)
        new_raw = xp.asarray(self._raw_weights(xp.asarray(statistic, dtype=xp.float64)), dtype=xp.int32)
        scored, total, squares = change_sums(old_raw, new_raw)
        for table, values in zip(tables, (new_raw, statistic), strict=True):
            scatter(table, rows, values)
        state.scored += scored
        state.raw_sum += total
        state.raw_square_sum += squares
