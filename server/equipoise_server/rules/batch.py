"""Batch rules: they weigh the examples of a step against each other and keep nothing per example."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Generic

import numpy as np
import torch
from numpy.typing import NDArray

from equipoise_server.rules.base import RuleError, Scalars, Statistics, TableState
from equipoise_server.rules.exponential import exponential
from equipoise_server.rules.rule import Rule
from equipoise_server.rules.settings import SettingsT
from equipoise_server.rules.signals import check_length, check_signals
from equipoise_server.rules.slices import Slices

ROWS = "batch_rows"
"""Scalar: R, rows of the last step whose examples were scored; 0 or absent: no step yet."""
ROW_SQUARES = "batch_row_squares"
"""Scalar: Σw² over these rows, before the guard."""

_LOWEST_LOGIT = -40.0
"""Below e^-40 of the largest, a weight is as good as zero."""


class BatchRule(Rule, Generic[SettingsT]):
    """Base of the batch rules (see `Rule` for what each public method promises).

    A step's scored examples get w ∝ exp(logit), mean 1 over their rows; all others, and all reads, get 1. There are no
    tables: any N costs nothing, a page is never written, and what lasts is the step's scalars. They are weighed by the
    first of `signals`.
    """

    def __init__(self, settings: SettingsT) -> None:
        super().__init__(settings)
        self._settings = settings

    @property
    def columns(self) -> Mapping[str, torch.dtype]:
        """None."""
        return {}

    @abstractmethod
    def scale(self, state: TableState, signal: NDArray[np.float32]) -> Scalars:
        """The rule's own scalars of a step with this signal, [B] (0: the step has no rows)."""

    @abstractmethod
    def logits(self, signal: NDArray[np.float32], scalars: Scalars, *, clip: bool = False) -> NDArray[np.float64]:
        """ln w up to a constant, [B], B >= 1.

        Raises RuleError when the scalars do not belong to this step; where `clip`, it takes them all the same.
        """

    def init_slices(self, num_examples: int, *, device: torch.device) -> Slices[TableState]:
        """No tables."""
        yield from ()
        return TableState(num_examples=num_examples, columns={})

    def check(self, statistics: Statistics) -> None:
        """Raises RuleError when the step has rows but not the rule's signals."""
        check_signals(statistics, signals=self.signals, rule=self.name)

    def prepare(self, state: TableState, statistics: Statistics) -> Scalars:
        """The rule's scalars, and what the batch's evidence needs."""
        signal = self._signal(state, statistics)
        scalars = self.scale(state, signal)
        rows, squares = state.scalars.get(ROWS, 0.0), state.scalars.get(ROW_SQUARES, 0.0)
        if len(signal):
            counts = _counts(statistics, len(signal))
            weights = self._weights(signal, counts, scalars)
            rows, squares = float(counts.sum()), float((counts * weights * weights).sum())
        return {**scalars, ROWS: rows, ROW_SQUARES: squares}

    def apply(
        self, state: TableState, statistics: Statistics, scalars: Scalars, *, pages: NDArray[np.bool_] | None = None
    ) -> TableState:
        """Keeps the scalars."""
        self._check_scalars(scalars)
        signal = self._signal(state, statistics)
        if len(signal):
            self._check_ids(state, statistics)
            self.logits(signal, scalars)
        state.scalars = dict(scalars)
        return state

    def restore_slices(self, state: TableState) -> Slices[TableState]:
        """Checks the scalars."""
        yield from ()
        self._check_scalars(state.scalars)
        return state

    def weights(self, state: TableState, ids: NDArray[np.int64] | None) -> NDArray[np.float32]:
        """1."""
        return np.ones(state.num_examples if ids is None else len(ids), np.float32)

    def answer(
        self, state: TableState, statistics: Statistics | None, ids: NDArray[np.int64] | None
    ) -> NDArray[np.float32]:
        """The step's weights for the step's scored examples, else 1."""
        if statistics is None or not statistics.size:
            return self.weights(state, ids)
        signal = self._signal(state, statistics)
        # The scalars may be those of a later step: a step that was accepted is answered however small they are.
        weights = self._weights(signal, _counts(statistics, len(signal)), state.scalars, clip=True)
        if state.guard_strength:
            weights = weights * (1.0 - state.guard_strength) + state.guard_strength
        if ids is statistics.ids:
            return weights.astype(np.float32)
        if statistics.ids is None:
            return weights[ids].astype(np.float32)
        served = self.weights(state, ids)
        if ids is None:
            served[statistics.ids] = weights
            return served
        order = np.argsort(statistics.ids)
        places = np.searchsorted(statistics.ids, ids, sorter=order).clip(max=len(order) - 1)
        entries = order[places]
        found = statistics.ids[entries] == ids
        served[found] = weights[entries[found]]
        return served

    def scores(self, state: TableState, ids: NDArray[np.int64] | None) -> NDArray[np.float32]:
        """NaN: nothing is kept."""
        return np.full(state.num_examples if ids is None else len(ids), np.nan, np.float32)

    def above_floor(
        self, state: TableState, ids: NDArray[np.int64] | None, *, trajectory_row: int | None = None
    ) -> NDArray[np.bool_]:
        """Always: there is no floor."""
        return np.ones(state.num_examples if ids is None else len(ids), np.bool_)

    def effective_examples(self, state: TableState) -> float:
        """(Σw)²/Σw² over the rows of the last step, with the guard's mix; N before the first."""
        return min(max(self._effective_rows(state), 1.0), float(state.num_examples))

    def effective_ratio(self, state: TableState) -> float:
        """The same over the rows of the last step; 1 before the first."""
        rows = state.scalars.get(ROWS, 0.0)
        return min(self._effective_rows(state) / rows, 1.0) if rows else 1.0

    @staticmethod
    def _effective_rows(state: TableState) -> float:
        rows, squares, guard = state.scalars.get(ROWS, 0.0), state.scalars.get(ROW_SQUARES, 0.0), state.guard_strength
        if not rows:
            return float(state.num_examples)
        kept = 1.0 - guard
        return rows * rows / (kept * kept * squares + (2.0 * kept + guard) * guard * rows)

    def _weights(
        self, signal: NDArray[np.float32], counts: NDArray[np.float64], scalars: Scalars, *, clip: bool = False
    ) -> NDArray[np.float64]:
        """w [B], with Σ counts·w = Σ counts."""
        logits = self.logits(signal, scalars, clip=clip)
        shifted = (logits - logits.max()).clip(min=_LOWEST_LOGIT)
        shares: NDArray[np.float64] = exponential(shifted, squarings=11)
        return shares * (float(counts.sum()) / float((counts * shares).sum()))

    def _signal(self, state: TableState, statistics: Statistics) -> NDArray[np.float32]:
        signal: NDArray[np.float32] | None = getattr(statistics, self.signals[0])
        if signal is None:
            return np.zeros(0, np.float32)
        return check_length(signal, statistics, num_examples=state.num_examples, name=self.signals[0], rule=self.name)

    def _check_ids(self, state: TableState, statistics: Statistics) -> None:
        if statistics.ids is not None and not 0 <= statistics.ids.min() <= statistics.ids.max() < state.num_examples:
            raise IndexError(f"ids must be in [0, {state.num_examples})")

    def _check_scalars(self, scalars: Scalars) -> None:
        for name, value in scalars.items():
            if not (math.isfinite(value) and value >= 0.0):
                raise RuleError(name, f"{name} = {value}: rule {self.name} needs a finite number >= 0")


def _counts(statistics: Statistics, size: int) -> NDArray[np.float64]:
    return np.ones(size) if statistics.counts is None else statistics.counts.astype(np.float64)
