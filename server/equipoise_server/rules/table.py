"""Table rules: a statistic and a raw weight per example, and what is read from them."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from equipoise_server.rules.arrays import Array, gather, here, namespace, rows_of, table
from equipoise_server.rules.base import PAGE_EXAMPLES, RuleError, Scalars, Statistics, TableState
from equipoise_server.rules.rule import Rule
from equipoise_server.rules.scale import Scale
from equipoise_server.rules.settings import RuleSettings
from equipoise_server.rules.signals import check_signals
from equipoise_server.rules.slices import SLICE_VALUES, Slices, fill
from equipoise_server.rules.sums import spans, table_sums

RAW = "raw"
"""Column of raw weights in fixed point; -1: never scored."""


class TableRule(Rule):
    """Base of the rules that keep a raw weight per example (see `Rule` for what each public method promises).

    A subclass says how a visit moves its statistic (`advance`) and how a step changes the tables (`apply`).

    Args:
        settings: of the rule.
        scale: what it reads of a step.
        statistic: column of the statistic, float32: what SCORE reads.
    """

    raw_dtype: ClassVar[torch.dtype]
    raw_range: tuple[int, int]
    """Smallest (the floor) and largest raw weight, fixed point."""

    def __init__(self, settings: RuleSettings, *, scale: Scale, statistic: str = "ema") -> None:
        super().__init__(settings)
        self.name = scale.rule
        self.signals = scale.signals
        self.statistic = statistic
        self.sparse_contributions = "contributions" not in scale.signals
        self._scale = scale

    @property
    def columns(self) -> Mapping[str, torch.dtype]:
        """The statistic and the raw weight."""
        return {self.statistic: torch.float32, RAW: self.raw_dtype}

    @abstractmethod
    def advance(self, old: Array, signal: Array, first: Array) -> Array:
        """The statistic after a visit: float64 [B].

        Args:
            old: float64 [B], statistic before the visit (0 where never scored).
            signal: float64 [B], in units of the running RMS.
            first: bool [B], whether this is the first visit.
        """

    def init_slices(self, num_examples: int, *, device: torch.device) -> Slices[TableState]:
        """The uniform policy, in slices."""
        columns = {name: torch.empty(num_examples, dtype=dtype, device=device) for name, dtype in self.columns.items()}
        for name, column in columns.items():
            yield from fill(column, -1 if name == RAW else 0)
        return TableState(num_examples=num_examples, columns=columns)

    def check(self, statistics: Statistics) -> None:
        """Raises RuleError when the step has rows but not the rule's signals."""
        check_signals(statistics, signals=self.signals, rule=self.name)

    def prepare(self, state: TableState, statistics: Statistics) -> Scalars:
        """The scalars of the scale."""
        return self._scale.after(state.scalars, self._rows(state, statistics), statistics)

    def restore_slices(self, state: TableState) -> Slices[TableState]:
        """Checks the tables and recomputes the exact sums, in slices."""
        self._scale.check(state.scalars)
        self._check_columns(state)
        scored = total = squares = 0
        # A page's temporaries stay in the cache: a millisecond. Elsewhere it is the number of launches that takes time.
        rows = PAGE_EXAMPLES if state.device.type == "cpu" else SLICE_VALUES
        for span in spans(state.num_examples, rows=rows):
            self._check_span(state, span)
            sums = table_sums(state.columns[RAW][span])
            scored, total, squares = scored + sums[0], total + sums[1], squares + sums[2]
            yield
        state.scored, state.raw_sum, state.raw_square_sum = scored, total, squares
        return state

    def weights(self, state: TableState, ids: NDArray[np.int64] | None) -> NDArray[np.float32]:
        """Served weights."""
        raw, factor, guard = table(state.columns[RAW]), self._weight_per_raw(state), state.guard_strength
        if ids is not None:
            return _served(raw[rows_of(raw, ids)], factor, guard)
        return np.concatenate([_served(raw[span], factor, guard) for span in spans(state.num_examples)])

    def scores(self, state: TableState, ids: NDArray[np.int64] | None) -> NDArray[np.float32]:
        """The statistic, NaN where never scored."""
        raw, statistic = self._tables(state)
        rows = rows_of(raw, ids)
        return np.where(here(gather(raw, rows)) < 0, np.float32(np.nan), here(gather(statistic, rows)))

    def above_floor(
        self, state: TableState, ids: NDArray[np.int64] | None, *, trajectory_row: int | None = None
    ) -> NDArray[np.bool_]:
        """Whether the raw weight is above the floor; always so where floor and top are the same."""
        column, (floor, top) = table(state.columns[RAW]), self.raw_range
        raw = gather(column, rows_of(column, ids))
        return np.ones(len(raw), np.bool_) if floor == top else here(raw != floor)

    def effective_examples(self, state: TableState) -> float:
        """(Σw)²/Σw² with w = 1 for the N - K unscored, and the guard's mix expanded."""
        total, squares = self._weight_sums(state)
        rest, guard = state.num_examples - state.scored, state.guard_strength
        kept, total, squares = 1.0 - guard, total + rest, squares + rest
        mixed_squares = kept * kept * squares + 2.0 * kept * guard * total + guard * guard * state.num_examples
        mixed_total = kept * total + guard * state.num_examples
        return min(max(mixed_total * mixed_total / mixed_squares, 1.0), float(state.num_examples))

    def _weight_per_raw(self, state: TableState) -> float | None:
        """Served weight of one raw unit before the guard; None: all weights are 1, since nothing has raw weight."""
        return state.scored / state.raw_sum if state.raw_sum else None

    def _weight_sums(self, state: TableState) -> tuple[float, float]:
        """Σw and Σw² over the scored examples, before the guard."""
        if not state.raw_sum:
            return float(state.scored), float(state.scored)
        return float(state.scored), state.scored**2 * state.raw_square_sum / state.raw_sum**2

    def _rows(self, state: TableState, statistics: Statistics) -> NDArray[np.float32]:
        return self._scale.rows(statistics, num_examples=state.num_examples)

    def _located(
        self, state: TableState, statistics: Statistics, scalars: Scalars, pages: NDArray[np.bool_] | None
    ) -> tuple[NDArray[np.int64] | None, NDArray[np.float64]]:
        """The step's ids (None: all) and their scaled signal, restricted to `pages`."""
        signal = self._scale.scaled(self._rows(state, statistics), statistics, scalars)
        ids = statistics.ids
        if pages is not None and len(signal) and not pages.all():
            ids = np.arange(state.num_examples) if ids is None else ids
            kept = pages[ids // PAGE_EXAMPLES]
            ids, signal = ids[kept], signal[kept]
        return ids, signal

    def _tables(self, state: TableState) -> tuple[Array, Array]:
        """The raw weights and the statistic."""
        return table(state.columns[RAW]), table(state.columns[self.statistic])

    def _advanced(self, old: Array, signal: Array, first: Array) -> Array:
        """The statistic after a visit, float32 [B]: rounded as the table keeps it."""
        xp = namespace(old)
        return xp.asarray(self.advance(xp.asarray(old, dtype=xp.float64), signal, first), dtype=xp.float32)

    def _check_columns(self, state: TableState) -> None:
        for name, dtype in self.columns.items():
            column = state.columns.get(name)
            if column is None or column.dtype != dtype or column.shape != (state.num_examples,):
                raise RuleError(f"state.{name}", f"state.{name}: rule {self.name} needs {dtype} [{state.num_examples}]")

    def _check_span(self, state: TableState, span: slice) -> None:
        floor, top = self.raw_range
        raw, statistic = state.columns[RAW][span], state.columns[self.statistic][span]
        self._check_rows(RAW, raw, (raw == -1) | ((raw >= floor) & (raw <= top)), span.start)
        self._check_rows(self.statistic, statistic, torch.isfinite(statistic), span.start)

    def _check_rows(self, name: str, values: torch.Tensor, good: torch.Tensor, offset: int) -> None:
        if not bool(good.all()):
            first = int((~good).nonzero()[0])
            where = f"state.{name}[{offset + first}]"
            raise RuleError(f"state.{name}", f"{where} = {values[first].item()}: rule {self.name} never writes that")


def page_runs(pages: NDArray[np.bool_] | None, num_examples: int) -> Iterator[slice]:
    """Slices of the rows of the selected pages, neighbours joined; None: all rows."""
    if pages is None:
        yield slice(0, num_examples)
        return
    edges = np.flatnonzero(np.diff(pages, prepend=False, append=False))
    for first, end in edges.reshape(-1, 2).tolist():
        yield slice(first * PAGE_EXAMPLES, min(end * PAGE_EXAMPLES, num_examples))


def _served(raw: Array, factor: float | None, guard: float) -> NDArray[np.float32]:
    if factor is None:
        return np.ones(len(raw), np.float32)
    xp = namespace(raw)
    weights = xp.where(raw < 0, 1.0, xp.asarray(raw, dtype=xp.float64) * factor)
    if guard:
        weights = weights * (1.0 - guard) + guard
    return here(xp.asarray(weights, dtype=xp.float32))
