"""Rules whose examples are sources, few and visited often: each weight follows from the losses of all of them."""

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from equipoise_server.rules.arrays import Array, gather, here, namespace, rows_of, scatter, table, there
from equipoise_server.rules.base import RuleError, Scalars, Statistics, TableState
from equipoise_server.rules.exponential import exponential
from equipoise_server.rules.scale import Scale
from equipoise_server.rules.settings import RuleSettings
from equipoise_server.rules.signals import check_finite
from equipoise_server.rules.slices import Slices
from equipoise_server.rules.sums import table_sums
from equipoise_server.rules.table import RAW, TableRule, page_runs
from equipoise_server.rules.weights import ONE, fixed_point

SOURCES = "sources"
"""Scalar: K, how many sources have reported, with the last step's; absent before the first."""
TIME = "time"
"""Scalar: t, how many steps reported some, a whole number; absent before the first."""
SHIFT = "shift"
"""Scalar: the largest exponent of the last step."""
MEAN = "mean"
"""Scalar: mean of what the sources weighed in the last step before they were brought to mean 1."""

MAX_WEIGHT = 2048
"""A single source weighs no more: fixed-point sums take values below 2^42."""

_LOWEST_EXPONENT = -40.0
"""Below e^-40 of the largest, a weight is as good as zero."""

Columns: TypeAlias = Mapping[str, Array]


class Nats(Scale):
    """Losses as they are, in nats: their scale matters."""

    signals: tuple[str, ...] = ("losses",)
    signal_name = "losses"

    def __init__(self, *, rule: str) -> None:
        super().__init__(rule=rule, decay=0.0)

    def read(self, statistics: Statistics) -> NDArray[np.float32] | None:
        """The losses, float32 [B]."""
        return statistics.losses

    def after(self, before: Scalars, signal: NDArray[np.float32], statistics: Statistics) -> Scalars:
        """None. Raises RuleError when a value is not finite."""
        check_finite(signal, name=self.signal_name, rule=self.rule)
        return {}

    def check(self, scalars: Scalars) -> None:
        """Nothing to check."""


class SourceRule(TableRule):
    """w = (1-ε)·v/mean(v) + ε over the K sources seen so far, with v = u·exp(rate·s) and s a source's statistic.

    u is 1: a softmax; or, where it `ascends`, the weight before the step: exponentiated ascent. Sources that did not
    report yet have weight 1, and so enter with an equal share: as if K had always been the number of sources. A step
    costs O(N), since its losses move the weights of all. What a row becomes follows from itself and the step's scalars
    alone, of which the largest exponent and the mean of v are computed from all rows when the step comes.

    Args:
        settings: of the rule.
        scale: what is read of a step.
        advance: the statistic after a visit, see `TableRule.advance`.
        rate: what an exponent is per unit of the statistic.
        floor: ε, smallest weight: a source's share of the draws is at least ε/N.
        statistic: column of the statistic.
        ascends: whether u is the weight before.
        absent_stay: whether the exponents of sources that are not in the step are 0.
    """

    raw_dtype = torch.int64
    touches_all_rows = True

    def __init__(
        self,
        settings: RuleSettings,
        *,
        scale: Nats,
        advance: Callable[[Array, Array, Array], Array],
        rate: float,
        floor: float,
        statistic: str,
        ascends: bool = False,
        absent_stay: bool = False,
    ) -> None:
        super().__init__(settings, scale=scale, statistic=statistic)
        self._advance = advance
        self._rate = rate
        self._floor = floor
        self._ascends = ascends
        self._absent_stay = absent_stay
        lowest = fixed_point(floor)
        self.raw_range = lowest, ONE if lowest == ONE else MAX_WEIGHT * ONE

    def advance(self, old: Array, signal: Array, first: Array) -> Array:
        """The statistic after a visit."""
        return self._advance(old, signal, first)

    def pace(self, *, sources: float, time: float) -> Scalars:
        """Further scalars, of K and t: whatever library functions give is made once, and logged."""
        return {}

    def rate(self, scalars: Scalars) -> float:
        """What an exponent is per unit of the statistic."""
        return self._rate

    def uniform_share(self, scalars: Scalars) -> float:
        """ε of a step."""
        return self._floor

    def visit(
        self, old: Columns, signal: NDArray[np.float64], counts: NDArray[np.int64], scalars: Scalars
    ) -> dict[str, Array]:
        """What the step's rows become, [B], by column; all but the raw weight.

        Args:
            old: the rows as they were, by column.
            signal: of the step, float64 [B].
            counts: how many rows of the request are of each source, int64 [B].
            scalars: the step's.
        """
        return {self.statistic: self._advanced(old[self.statistic], there(old[RAW], signal), old[RAW] < 0)}

    def prepare(self, state: TableState, statistics: Statistics) -> Scalars:
        """K, t, and what brings the largest exponent to 0 and the weights to mean 1."""
        signal = self._rows(state, statistics)
        self._scale.after(state.scalars, signal, statistics)
        if not len(signal):
            return dict(state.scalars)
        columns = {name: here(table(column)) for name, column in state.columns.items()}
        told = _told(columns[RAW], statistics)
        seen = told | (columns[RAW] >= 0)
        time = _whole(state.scalars, TIME, self.name) + 1.0
        sources = float(np.count_nonzero(seen))
        scalars = {SOURCES: sources, TIME: time, **self.pace(sources=sources, time=time)}
        visited = self._visited(columns, statistics, scalars)
        shift = float(self._exponents(visited, told, scalars)[seen].max())
        scalars = {**scalars, SHIFT: shift}
        grown = self._grown(visited, told, scalars)
        return {**scalars, MEAN: math.fsum(grown[seen].tolist()) / sources}

    def apply(
        self, state: TableState, statistics: Statistics, scalars: Scalars, *, pages: NDArray[np.bool_] | None = None
    ) -> TableState:
        """Moves the statistics of the step's sources, and the weights of all."""
        if len(self._rows(state, statistics)):
            self._check_scalars(scalars)
            columns = {name: table(column) for name, column in state.columns.items()}
            told = _told(columns[RAW], statistics)
            new = self._weighed(self._visited(columns, statistics, scalars), told, scalars)
            for rows in page_runs(pages, state.num_examples):
                for name, values in new.items():
                    columns[name][rows] = values[rows]
            state.scored, state.raw_sum, state.raw_square_sum = table_sums(state.columns[RAW])
        state.scalars = dict(scalars)
        return state

    def restore_slices(self, state: TableState) -> Slices[TableState]:
        """Checks tables and scalars, and recomputes the exact sums, in slices."""
        if state.scalars:
            self._check_scalars(state.scalars)
        return (yield from super().restore_slices(state))

    def _visited(self, columns: Columns, statistics: Statistics, scalars: Scalars) -> dict[str, Array]:
        """The columns, [N], those with statistics as copies in which the step's rows have moved."""
        rows = rows_of(columns[RAW], statistics.ids)
        old = {name: gather(column, rows) for name, column in columns.items()}
        signal = self._scale.rows(statistics, num_examples=len(columns[RAW])).astype(np.float64)
        counts = np.ones(len(signal), np.int64) if statistics.counts is None else statistics.counts
        moved = {}
        for name, values in self.visit(old, signal, counts, scalars).items():
            moved[name] = columns[name] * 1  # a copy
            scatter(moved[name], rows, values)
        return {**columns, **moved}

    def _weighed(self, visited: Columns, told: Array, scalars: Scalars) -> dict[str, Array]:
        """The same with new raw weights."""
        raw, uniform, (lowest, top) = visited[RAW], self.uniform_share(scalars), self.raw_range
        xp = namespace(raw)
        weights = self._grown(visited, told, scalars) * ((1.0 - uniform) / scalars[MEAN]) + uniform
        fixed = xp.asarray(xp.clip(xp.round(weights * ONE), lowest, top), dtype=xp.int64)
        return {**visited, RAW: xp.where(told | (raw >= 0), fixed, -1)}

    def _grown(self, visited: Columns, told: Array, scalars: Scalars) -> Array:
        """v, float64 [N], the largest factor being 1."""
        raw = visited[RAW]
        xp = namespace(raw)
        exponents = self._exponents(visited, told, scalars) - scalars[SHIFT]
        factors = exponential(xp.clip(exponents, _LOWEST_EXPONENT, 0.0), squarings=11)
        if not self._ascends:
            return factors
        return xp.asarray(xp.where(raw < 0, ONE, raw), dtype=xp.float64) * (1.0 / ONE) * factors

    def _exponents(self, visited: Columns, told: Array, scalars: Scalars) -> Array:
        """rate·s, float64 [N]."""
        xp = namespace(told)
        exponents = xp.asarray(visited[self.statistic], dtype=xp.float64) * self.rate(scalars)
        return xp.where(told, exponents, 0.0) if self._absent_stay else exponents

    def _check_scalars(self, scalars: Scalars) -> None:
        """Raises RuleError unless the rule may have written them."""
        for name in (SOURCES, TIME):
            if _whole(scalars, name, self.name) < 1.0:
                raise RuleError(name, f"{name} = {scalars.get(name)}: rule {self.name} needs a whole number above 0")
        shift, mean = scalars.get(SHIFT, math.nan), scalars.get(MEAN, math.nan)
        if not math.isfinite(shift):
            raise RuleError(SHIFT, f"{SHIFT} = {shift}: rule {self.name} needs a finite number")
        if not 0.0 < mean < math.inf:
            raise RuleError(MEAN, f"{MEAN} = {mean}: rule {self.name} needs a finite number above 0")


def latest(old: Array, new: Array, first: Array) -> Array:
    """A statistic without memory."""
    return new


def _told(raw: Array, statistics: Statistics) -> Array:
    """Which rows are in the step, bool [N]."""
    told = raw < -1  # none
    scatter(told, rows_of(raw, statistics.ids), True)
    return told


def _whole(scalars: Mapping[str, float], name: str, rule: str) -> float:
    """A count; 0 where it is absent. Raises RuleError unless it is a whole number that float64 holds."""
    value = scalars.get(name, 0.0)
    if not (0.0 <= value < 2.0**53 and float(value).is_integer()):
        raise RuleError(name, f"{name} = {value}: rule {rule} needs a whole number below 2^53")
    return float(value)
