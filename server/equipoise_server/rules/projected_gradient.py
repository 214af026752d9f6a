"""`projected_gradient`: the paper's proximal step with the instantaneous gradient, projected exactly; O(N) a step."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from equipoise_server.rules.arrays import Array, gather, rows_of, scatter, there
from equipoise_server.rules.base import RuleError, Scalars, Statistics, TableState
from equipoise_server.rules.ema import moving_average
from equipoise_server.rules.projection import ONE, find_threshold
from equipoise_server.rules.scale import Scale
from equipoise_server.rules.settings import EmaSettings, number
from equipoise_server.rules.slices import Slices
from equipoise_server.rules.sums import table_sums
from equipoise_server.rules.table import RAW, TableRule, page_runs
from equipoise_server.rules.weights import fixed_point

THRESHOLD = "threshold"
"""Scalar: τ of the last step's projection, an integer in units of 2^-32."""

_MAX_STEP = 2.0**19
"""Longest move of one weight. |τ| stays below 4e4 for all allowed settings (an RMS bounds how many contributions are
large), and what lands this far beyond it is at a bound either way."""

_MAX_THRESHOLD = 2.0**53
"""Integers below it survive the scalars' float64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectedGradientSettings(EmaSettings):
    """Settings of `projected_gradient`."""

    step_size: float = number(0.1, low=1e-6, high=10.0)
    """ε: how far a contribution of one running RMS moves a weight, before the projection."""

    floor: float = number(0.0, low=0.0, high=0.99)
    """Smallest weight. At 0 weights become exactly zero, and trainers must measure the unweighted loss of those too."""

    cap: float = number(10.0, low=1.01, high=1000.0)
    """Largest weight."""


class ProjectedGradient(TableRule):
    """w ← projection of w + ε·c onto {floor <= w <= cap, mean 1} over the scored examples (arXiv 2402.17759, Eq. 6).

    An example enters at weight 1. Weights are int64 in units of 2^-32; the score is the moving average of c. A step
    changes all rows, each from its own values and τ alone. What it does to all N is done in torch, on every core.
    """

    raw_dtype = torch.int64
    touches_all_rows = True

    def __init__(self, settings: ProjectedGradientSettings) -> None:
        super().__init__(settings, scale=Scale(rule="projected_gradient", decay=settings.rms_decay))
        self.raw_range = fixed_point(settings.floor, ONE), fixed_point(settings.cap, ONE)
        self._step_size = settings.step_size
        self._advance = moving_average(settings.ema_decay)

    def advance(self, old: Array, signal: Array, first: Array) -> Array:
        """The moving average after a visit."""
        return self._advance(old, signal, first)

    def prepare(self, state: TableState, statistics: Statistics) -> Scalars:
        """The running mean square and τ."""
        scalars = super().prepare(state, statistics)
        start = state.scalars.get(THRESHOLD, 0.0)
        signal = self._scale.scaled(self._rows(state, statistics), statistics, scalars)
        if len(signal) == 0:
            return {**scalars, THRESHOLD: start}
        values, scored = self._moved(state.columns[RAW], statistics.ids, signal)
        values = values if bool(scored.all()) else values[scored]
        floor, cap = self.raw_range
        return {**scalars, THRESHOLD: float(find_threshold(values, floor=floor, cap=cap, start=int(start)))}

    def apply(
        self, state: TableState, statistics: Statistics, scalars: Scalars, *, pages: NDArray[np.bool_] | None = None
    ) -> TableState:
        """Moves the step's rows, then takes τ off all scored rows."""
        threshold, (floor, cap) = self._threshold(scalars), self.raw_range
        if len(self._rows(state, statistics)):
            ids, signal = self._located(state, statistics, scalars, pages)
            raw, (visited, column) = state.columns[RAW], self._tables(state)
            values, scored = self._moved(raw, ids, signal)
            new_raw = torch.where(scored, (values - threshold).clamp_(floor, cap), -1)
            index = rows_of(visited, ids)
            first = gather(visited, index) < 0
            scatter(column, index, self._advanced(gather(column, index), there(visited, signal), first))
            for rows in page_runs(pages, state.num_examples):
                raw[rows] = new_raw[rows]
            state.scored, state.raw_sum, state.raw_square_sum = table_sums(raw)
        state.scalars = dict(scalars)
        return state

    def restore_slices(self, state: TableState) -> Slices[TableState]:
        """Checks the tables and τ, and recomputes the exact sums, in slices."""
        self._threshold(state.scalars)
        return (yield from super().restore_slices(state))

    def _moved(
        self, raw: torch.Tensor, ids: NDArray[np.int64] | None, signal: NDArray[np.float64]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """w + ε·c of all rows, int64 [N], and which rows are scored, bool [N]."""
        steps = np.clip(signal * self._step_size, -_MAX_STEP, _MAX_STEP)
        moves = there(raw, np.rint(steps * ONE).astype(np.int64))
        scored, index = raw >= 0, rows_of(raw, ids)
        if index is None:
            return torch.where(scored, raw, ONE) + moves, torch.ones_like(scored)
        rows = gather(raw, index)
        values = raw.index_copy(0, index, torch.where(rows < 0, ONE, rows) + moves)
        return values, scored.index_fill_(0, index, True)

    def _threshold(self, scalars: Scalars) -> int:
        threshold = scalars.get(THRESHOLD, 0.0)
        if not (abs(threshold) < _MAX_THRESHOLD and threshold.is_integer()):
            raise RuleError(THRESHOLD, f"{THRESHOLD} = {threshold}: rule {self.name} needs an integer below 2^53")
        return int(threshold)

    def _weight_per_raw(self, state: TableState) -> float:
        return 1.0 / ONE

    def _weight_sums(self, state: TableState) -> tuple[float, float]:
        return state.raw_sum / ONE, state.raw_square_sum / ONE**2
