"""A rule: the function that turns statistics into the next policy, as two pure steps on a state of tables.

Shape legend: see `base`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from equipoise_server.rules.base import (
    PAGE_EXAMPLES,
    LoggedStatistics,
    RuleError,
    Scalars,
    SettingValues,
    Statistics,
    StrataReport,
    TableState,
)
from equipoise_server.rules.settings import RuleSettings, resolved
from equipoise_server.rules.slices import Slices, exhaust


class Rule(ABC):
    """A rule with its settings bound.

    `update` is `apply` after `prepare`. `prepare` reads the whole state and changes nothing; `apply` is row-local: the
    new row depends on the old row, the step's statistics of that row and the step's scalars only. A log entry keeps
    the statistics and the scalars, so that pages captured at different versions can be replayed one by one.

    Every operation is exact or correctly rounded for each row by itself: results do not depend on the number of
    threads, on how steps are fused, or on what else is in the batch beyond what the rule defines.
    """

    name: str
    """Name in the registry."""
    signals: tuple[str, ...]
    """Names of the statistics that it reads."""
    sparse_contributions: bool = False
    """Whether a step may have rows without a contribution; else such rows are as good as not scored."""
    touches_all_rows: ClassVar[bool] = False
    """Whether a step may change rows other than its own."""
    kept: ClassVar[tuple[str, ...]] = ()
    """Names of what `read_kept` reads."""

    def __init__(self, settings: RuleSettings) -> None:
        self._resolved = resolved(settings)

    @property
    def settings(self) -> SettingValues:
        """All settings, resolved: defaults filled in."""
        return self._resolved

    @property
    @abstractmethod
    def columns(self) -> Mapping[str, torch.dtype]:
        """Names and element types of the tables; at most 16 bytes per example (of each row of a trajectory)."""

    @property
    def trajectory_rows(self) -> int:
        """T, number of rows of a trajectory, a policy for each training step; 0: the rule has one policy for all."""
        return 0

    def init(self, num_examples: int, *, device: torch.device) -> TableState:
        """The uniform policy. On device `meta` its tables have shapes but no memory."""
        return exhaust(self.init_slices(num_examples, device=device))

    @abstractmethod
    def init_slices(self, num_examples: int, *, device: torch.device) -> Slices[TableState]:
        """`init` in slices of about a million values; it raises when its first slice is asked for."""

    def touched_pages(self, state: TableState, statistics: Statistics) -> NDArray[np.int64] | slice:
        """Which pages a step may change, as an index into arrays [P]: by default those of the step's examples."""
        if self.touches_all_rows or statistics.ids is None:
            return slice(None)
        return statistics.ids // PAGE_EXAMPLES

    def max_log_bytes(self, state: TableState) -> int | None:
        """Bytes of log above which writing the pages is worth it for the rule; None: when the log outgrows the tables.

        A rule whose steps dirty few pages asks for less: a sweep then writes no more bytes than a later one would.
        """
        return None

    @abstractmethod
    def check(self, statistics: Statistics) -> None:
        """Raises RuleError when the step lacks what the rule needs, or brings reference losses it does not read."""

    @abstractmethod
    def prepare(self, state: TableState, statistics: Statistics) -> Scalars:
        """The step's scalars. Changes nothing. Raises RuleError when they are not finite."""

    @abstractmethod
    def apply(
        self, state: TableState, statistics: Statistics, scalars: Scalars, *, pages: NDArray[np.bool_] | None = None
    ) -> TableState:
        """Applies the step's row updates and keeps the exact sums; consumes `state` (tables change in place).

        New rows are computed and checked before the first is written: after a RuleError the state is as it was.

        Args:
            state: state before the step.
            statistics: the step.
            scalars: the step's scalars, from `prepare` or from the log.
            pages: bool [P]; rows of pages that are False are left as they are. None: all pages.
        """

    def update(self, state: TableState, statistics: Statistics) -> TableState:
        """The next policy: `apply` with `prepare`'s scalars."""
        self.check(statistics)
        return self.apply(state, statistics, self.prepare(state, statistics))

    def replay(self, state: TableState, steps: Sequence[LoggedStatistics]) -> TableState:
        """`apply` of all steps one after another, to the last bit, but faster where steps can be fused.

        Raises what the `apply` that fails would raise; the state is not to be used then.
        """
        for step in steps:
            state = self.apply(state, step.statistics, step.scalars, pages=step.pages)
        return state

    def restore(self, state: TableState) -> TableState:
        """Recomputes scored, raw_sum and raw_square_sum after tables were loaded. Exact.

        Raises RuleError when a table holds what the rule can never write (out of range, not finite).
        """
        return exhaust(self.restore_slices(state))

    @abstractmethod
    def restore_slices(self, state: TableState) -> Slices[TableState]:
        """`restore` in slices; nobody else uses the state until the last one."""

    @abstractmethod
    def weights(self, state: TableState, ids: NDArray[np.int64] | None) -> NDArray[np.float32]:
        """Served weights, mean 1 over N: float32 [len(ids)], or [N] for None; ids in [0, N), repeats allowed.

        Of a trajectory: the mean over its rows.
        """

    def trajectory_weights(self, state: TableState, rows: slice, ids: NDArray[np.int64] | None) -> NDArray[np.float32]:
        """Served weights of rows of a trajectory: float32 [rows, len(ids)], or [rows, N] for None.

        Raises RuleError when the rule has no trajectory.
        """
        raise RuleError("first_row", f"first_row = {rows.start}: rule {self.name} has no trajectory rows")

    def answer(
        self, state: TableState, statistics: Statistics | None, ids: NDArray[np.int64] | None
    ) -> NDArray[np.float32]:
        """Served weights as a step is answered; shapes as for `weights`.

        Table rules answer what a read answers: all that the step told is in the table. Batch rules weigh the step's own
        examples, and 1 elsewhere: the step was just applied to `state`, or was applied before and is sent again; then
        its statistics are weighed on the scale of now. A trajectory answers with the row of the step or read.

        Args:
            state: state after the step.
            statistics: the step; None or without rows: a read.
            ids: int64, in [0, N), repeats allowed; None: all N.
        """
        return self.weights(state, ids)

    @abstractmethod
    def scores(self, state: TableState, ids: NDArray[np.int64] | None) -> NDArray[np.float32]:
        """The rule's own statistic, NaN where never scored; shapes as for `weights`."""

    def read_kept(self, state: TableState, name: str, ids: NDArray[np.int64] | None) -> NDArray[np.float32]:
        """What else the rule keeps of each example, NaN where nothing; shapes as for `weights`.

        `loss` is its smoothed loss, nats; `stratum` the number of its stratum. Raises RuleError for what is not `kept`.
        """
        raise RuleError("field", f"field = {name}: rule {self.name} keeps no such values")

    def strata(self, state: TableState) -> StrataReport | None:
        """The strata as they stand; None for rules without. Reads no table."""
        return None

    @abstractmethod
    def above_floor(
        self, state: TableState, ids: NDArray[np.int64] | None, *, trajectory_row: int | None = None
    ) -> NDArray[np.bool_]:
        """Whether the raw weight is above the floor (never scored: yes); shapes as for `weights`.

        Args:
            state: the policy.
            ids: int64, in [0, N); None: all N.
            trajectory_row: which row of a trajectory; None: the rule has none.
        """

    @abstractmethod
    def effective_examples(self, state: TableState) -> float:
        """1/Σγ² over the whole table, in [1, N] and O(1); for batch rules over the rows of the last step.

        Of a trajectory: the mean over its rows, in O(T).
        """

    def effective_ratio(self, state: TableState) -> float:
        """Effective examples over those among which the weight is spread, in (0, 1]; 1 is uniform.

        Among all N; for batch rules, whose weights have no meaning beyond a step, among the rows of the last one.
        """
        return self.effective_examples(state) / state.num_examples
