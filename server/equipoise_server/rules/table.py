"""Table rules: a statistic and a raw weight per example, and what is read from them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Generic

import numpy as np
import torch
from numpy.typing import NDArray

from equipoise_server.rules.base import PAGE_EXAMPLES, RuleError, Scalars, SettingValues, Statistics, TableState
from equipoise_server.rules.online import OnlineRule
from equipoise_server.rules.scale import MEAN_SQUARE, PerRow, next_mean_square, scaled
from equipoise_server.rules.settings import SignalSettingsT, resolved
from equipoise_server.rules.signals import check_length, check_signals
from equipoise_server.rules.slices import SLICE_VALUES, Slices, fill
from equipoise_server.rules.sums import spans, table_sums

RAW = "raw"
"""Column of raw weights in fixed point; -1: never scored."""


class TableRule(OnlineRule, ABC, Generic[SignalSettingsT]):
    """Base of the rules that keep tables (see `Rule` for what each public method promises).

    A subclass says how a visit moves its statistic (`advance`) and how a step changes the tables (`apply`). A rule from
    another signal than contributions overrides `signal`, `signals` and `signal_name`; one that adds to it, `scaled`.
    """

    settings_type: ClassVar[type[SignalSettingsT]]
    statistic: ClassVar[str] = "ema"
    """Column of the statistic, float32: what SCORE reads."""
    signals: tuple[str, ...] = ("contributions",)
    """Statistics that the rule reads."""
    signal_name: ClassVar[str] = "contributions"
    """What the signal is called in errors."""
    raw_dtype: ClassVar[torch.dtype]

    def __init__(self, settings: SignalSettingsT) -> None:
        self._settings = settings

    @property
    def settings(self) -> SettingValues:
        """All settings, resolved."""
        return resolved(self._settings)

    @property
    def columns(self) -> Mapping[str, torch.dtype]:
        """The statistic and the raw weight."""
        return {self.statistic: torch.float32, RAW: self.raw_dtype}

    @property
    @abstractmethod
    def raw_range(self) -> tuple[int, int]:
        """Smallest (the floor) and largest raw weight, fixed point."""

    @abstractmethod
    def advance(self, old: torch.Tensor, signal: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """The statistic after a visit: float64 [B].

        Args:
            old: float64 [B], statistic before the visit (0 where never scored).
            signal: float64 [B], in units of the running RMS.
            first: bool [B], whether this is the first visit.
        """

    def signal(self, statistics: Statistics) -> NDArray[np.float32] | None:
        """What the rule reads of a step, float32 [B]; None where the trainer did not send it."""
        return statistics.contributions

    def scaled(
        self, signal: NDArray[np.float32], statistics: Statistics, scalars: Mapping[str, PerRow]
    ) -> NDArray[np.float64]:
        """The signal in units of its running RMS, float64 [B]: of one step, or of rows of many with scalars of each.

        Row-local: a row's value depends on its own statistics and scalars.
        """
        return scaled(signal, scalars.get(MEAN_SQUARE, 0.0), rule=self.name)

    def init_slices(self, num_examples: int, *, device: torch.device) -> Slices[TableState]:
        """The uniform policy, in slices."""
        columns = {name: torch.empty(num_examples, dtype=dtype, device=device) for name, dtype in self.columns.items()}
        yield from fill(columns[self.statistic], 0.0)
        yield from fill(columns[RAW], -1)
        return TableState(num_examples=num_examples, columns=columns)

    def check(self, statistics: Statistics) -> None:
        """Raises RuleError when the step has rows but not the rule's signals."""
        check_signals(statistics, signals=self.signals, rule=self.name)

    def prepare(self, state: TableState, statistics: Statistics) -> Scalars:
        """The running mean square with this step included."""
        signal = self._rows(state, statistics)
        previous = state.scalars.get(MEAN_SQUARE, 0.0)
        decay = self._settings.rms_decay
        return {MEAN_SQUARE: next_mean_square(previous, signal, decay=decay, name=self.signal_name, rule=self.name)}

    def restore_slices(self, state: TableState) -> Slices[TableState]:
        """Checks the tables and recomputes the exact sums, in slices."""
        self._check_columns(state)
        scored = total = squares = 0
        # A page's temporaries stay in the cache: a millisecond. Elsewhere it is the number of launches that takes time.
        rows = PAGE_EXAMPLES if state.device.type == "cpu" else SLICE_VALUES
        for span in spans(state.num_examples, rows=rows):
            self._check_span(state, span)
            sums = table_sums(state.columns[RAW][span])
            scored, total, squares = scored + sums[0], total + sums[1], squares + sums[2]
            yield
        scaled(np.zeros(0, np.float32), state.scalars.get(MEAN_SQUARE, 0.0), rule=self.name)
        state.scored, state.raw_sum, state.raw_square_sum = scored, total, squares
        return state

    def weights(self, state: TableState, ids: NDArray[np.int64] | None) -> NDArray[np.float32]:
        """Served weights."""
        raw, factor, guard = state.columns[RAW], self._weight_per_raw(state), state.guard_strength
        if ids is not None:
            return _served(gather(raw, on_device(raw.device, ids)), factor, guard)
        return np.concatenate([_served(raw[span], factor, guard) for span in spans(state.num_examples)])

    def answer(
        self, state: TableState, statistics: Statistics | None, ids: NDArray[np.int64] | None
    ) -> NDArray[np.float32]:
        """The table's weights: all that the step told is in it."""
        return self.weights(state, ids)

    def scores(self, state: TableState, ids: NDArray[np.int64] | None) -> NDArray[np.float32]:
        """The statistic, NaN where never scored."""
        index = None if ids is None else on_device(state.device, ids)
        statistic, raw = (gather(state.columns[name], index) for name in (self.statistic, RAW))
        return _numpy_float32(torch.where(raw < 0, torch.nan, statistic))

    def above_floor(
        self, state: TableState, ids: NDArray[np.int64] | None, *, trajectory_row: int | None = None
    ) -> NDArray[np.bool_]:
        """Whether the raw weight is above the floor; always so where floor and top are the same."""
        raw = gather(state.columns[RAW], None if ids is None else on_device(state.device, ids))
        floor, top = self.raw_range
        above = raw != floor if floor < top else torch.ones_like(raw, dtype=torch.bool)
        return np.asarray(above.cpu().numpy(), dtype=np.bool_)

    def effective_examples(self, state: TableState) -> float:
        """(Σw)²/Σw² with w = 1 for the N - K unscored, and the guard's mix expanded."""
        total, squares = self._weight_sums(state)
        rest, guard = state.num_examples - state.scored, state.guard_strength
        kept, total, squares = 1.0 - guard, total + rest, squares + rest
        mixed_squares = kept * kept * squares + 2.0 * kept * guard * total + guard * guard * state.num_examples
        mixed_total = kept * total + guard * state.num_examples
        return min(max(mixed_total * mixed_total / mixed_squares, 1.0), float(state.num_examples))

    @abstractmethod
    def _weight_per_raw(self, state: TableState) -> float | None:
        """Served weight of one raw unit before the guard; None: all weights are 1, since nothing has raw weight."""

    @abstractmethod
    def _weight_sums(self, state: TableState) -> tuple[float, float]:
        """Σw and Σw² over the scored examples, before the guard."""

    def _rows(self, state: TableState, statistics: Statistics) -> NDArray[np.float32]:
        """The step's signal, with one value per row; empty where the step has none."""
        signal = self.signal(statistics)
        if signal is None:
            return np.zeros(0, np.float32)
        return check_length(signal, statistics, num_examples=state.num_examples, name=self.signal_name, rule=self.name)

    def _located(
        self, state: TableState, statistics: Statistics, scalars: Scalars, pages: NDArray[np.bool_] | None
    ) -> tuple[torch.Tensor | None, NDArray[np.float64]]:
        """Where the step's rows lie (None: everywhere) and their scaled signal, restricted to `pages`."""
        signal = self.scaled(self._rows(state, statistics), statistics, scalars)
        ids = statistics.ids
        if pages is not None and len(signal) and not pages.all():
            ids = np.arange(state.num_examples) if ids is None else ids
            kept = pages[ids // PAGE_EXAMPLES]
            ids, signal = ids[kept], signal[kept]
        return None if ids is None else on_device(state.device, ids), signal

    def _advanced(
        self, state: TableState, index: torch.Tensor | None, signal: NDArray[np.float64], first: torch.Tensor
    ) -> torch.Tensor:
        """The step's new statistics, float32 [B]."""
        old = gather(state.columns[self.statistic], index).double()
        return self.advance(old, torch.from_numpy(signal).to(state.device), first).float()

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


def fixed_point(value: float, one: int) -> int:
    """The multiple of 1/one nearest to `value`, ties to even."""
    return round(value * one)


def on_device(device: torch.device, ids: NDArray[np.int64]) -> torch.Tensor:
    """An index into tables on `device`."""
    return torch.from_numpy(ids if ids.flags.writeable else ids.copy()).to(device)


def gather(column: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """The rows of a column at `index`; None: the column itself."""
    return column if index is None else column.index_select(0, index)


def scatter(column: torch.Tensor, index: torch.Tensor | None, values: torch.Tensor) -> None:
    """Writes the rows of a column at `index`, distinct; None: all of them."""
    if index is None:
        column.copy_(values)
    else:
        column.index_copy_(0, index, values)


def _served(raw: torch.Tensor, factor: float | None, guard: float) -> NDArray[np.float32]:
    if factor is None:
        return np.ones(len(raw), np.float32)
    weights = torch.where(raw < 0, 1.0, raw.double() * factor)
    if guard:
        weights = weights * (1.0 - guard) + guard
    return _numpy_float32(weights)


def _numpy_float32(values: torch.Tensor) -> NDArray[np.float32]:
    return np.asarray(values.float().cpu().numpy(), dtype=np.float32)
