"""A rule: the function that turns statistics into the next policy, as two pure steps on a state of tables.

Shape legend: N examples of the policy, B distinct scored ids of one step, R rows of its tables (the N examples, or the
T rows of a trajectory), P pages of `page_rows` rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from equipoise_server.rules.guard import Guard
from equipoise_server.rules.slices import Slices

PAGE_EXAMPLES = 65_536
"""Examples per page: the unit in which tables are stored and replayed. A page of a trajectory has about as many
weights, in whole rows."""

Scalars: TypeAlias = dict[str, float]
"""What a step's row updates need beside the row and its statistics, by name; finite float64."""

SettingValues: TypeAlias = Mapping[str, float | bool | str]
"""Settings of a rule by name."""


class RuleError(ValueError):
    """A setting or a step that a rule cannot take; the message names field, value and rule."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What one step tells a rule: one entry per distinct id that has a scored row.

    Attributes:
        ids: int64 [B], distinct, in [0, N); None: all N examples in order.
        contributions: float32 [B], finite, or NaN where not measured, for rules with `sparse_contributions`; None where
            the trainer sent none.
        losses: float32 [B], nats, finite; None where the trainer sent none.
        reference_losses: float32 [B], nats, finite: of a reference model; None where the trainer sent none.
        groups: int64 [B], >= 0: a label or source of each example; None where the trainer sent none.
        successes: int64 [B], in [0, attempts]: how many attempts at each example succeeded; None where the trainer sent
            none.
        attempts: int64 [B], >= 1: how many there were; None where `successes` is.
        counts: int64 [B], rows of the request with this id, scored or not; None: one each.
        trajectory_row: t, which row of a trajectory the step or read is about; None: the rule has no trajectory.
    """

    ids: NDArray[np.int64] | None
    contributions: NDArray[np.float32] | None = None
    losses: NDArray[np.float32] | None = None
    reference_losses: NDArray[np.float32] | None = None
    groups: NDArray[np.int64] | None = None
    successes: NDArray[np.int64] | None = None
    attempts: NDArray[np.int64] | None = None
    counts: NDArray[np.int64] | None = None
    trajectory_row: int | None = None

    @property
    def size(self) -> int:
        """B, the number of distinct scored ids (0: the step carries no rows)."""
        given = (self.contributions, self.losses, self.reference_losses, self.attempts)
        return next((len(values) for values in given if values is not None), 0)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        given = (self.ids, self.contributions, self.losses, self.reference_losses)
        counted = (self.groups, self.successes, self.attempts, self.counts)
        return sum(values.nbytes for values in (*given, *counted) if values is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedStatistics:
    """A step as the log keeps it for a rule.

    Attributes:
        statistics: the step.
        scalars: its scalars, as `prepare` gave them.
        pages: bool [P]; rows of pages that are False are left as they are, since they hold the step already. None: all
            pages.
    """

    statistics: Statistics
    scalars: Scalars
    pages: NDArray[np.bool_] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stratum:
    """What is known of a stratum: examples of one group whose smoothed losses lie between two quantiles.

    Attributes:
        group: its group.
        stratum: which of its group, by rising loss.
        examples: how many are in it.
        above_loss: smoothed loss above which it begins, nats; None: the first one of its group, or nothing is known.
        contributions: how many count, older ones less.
        mean: of these, in units of the running RMS of all.
        error: standard error of the mean; 0 without contributions.
        z: mean over error after shrinkage; 0 where there are too few contributions.
        weight: served weight of its examples.
    """

    group: int
    stratum: int
    examples: int
    above_loss: float | None
    contributions: float
    mean: float
    error: float
    z: float
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StrataReport:
    """The strata of a policy, group after group, and how much they differ.

    Attributes:
        strata: all of them.
        contrast: F of their mean contributions, see `Merits.contrast`; None where too few have enough of them.
    """

    strata: tuple[Stratum, ...]
    contrast: float | None


@dataclass(slots=True, kw_only=True)
class TableState:
    """Tables of a policy with their exact sums.

    Attributes:
        num_examples: N.
        columns: tables by name, each [R] or [R, values per row], on one device. For a table rule R is N, and `raw` is
            one of them: the raw weight r in the rule's fixed-point unit, -1 where an example was never scored. A rule
            that keeps nothing has none.
        scalars: what the last step's row updates used.
        scored: K, the number of examples scored at least once.
        raw_sum: Σ raw over the scored ones, exact.
        raw_square_sum: Σ raw² over the scored ones, exact.
        sizes: int64 [strata], how many examples are in each stratum; empty for rules without. Replaced, never changed.
        moments: further exact sums of a rule that needs some.
        guard_strength: g in [0, 1]; served weight = (1 − g)·w + g.
        guard: what g follows from.
        page_rows: rows of every page but the last, which may have fewer.
    """

    num_examples: int
    columns: dict[str, torch.Tensor]
    scalars: Scalars = field(default_factory=dict)
    scored: int = 0
    raw_sum: int = 0
    raw_square_sum: int = 0
    sizes: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    moments: tuple[int, ...] = ()
    guard_strength: float = 0.0
    guard: Guard = field(default_factory=Guard)
    page_rows: int = PAGE_EXAMPLES

    @property
    def device(self) -> torch.device:
        """Device of the tables; the CPU without any."""
        return next((column.device for column in self.columns.values()), torch.device("cpu"))

    @property
    def num_rows(self) -> int:
        """R; 0 without tables."""
        return next((len(column) for column in self.columns.values()), 0)

    @property
    def num_pages(self) -> int:
        """P; 0 without tables."""
        return -(-self.num_rows // self.page_rows)

    @property
    def nbytes(self) -> int:
        """Memory of the tables, bytes."""
        return sum(column.nbytes for column in self.columns.values())


class Rule(Protocol):
    """A rule with its settings bound.

    `update` is `apply` after `prepare`. `prepare` reads the whole state and changes nothing; `apply` is row-local: the
    new row depends on the old row, the step's statistics of that row and the step's scalars only. A log entry keeps
    the statistics and the scalars, so that pages captured at different versions can be replayed one by one.

    Every operation is exact or correctly rounded for each row by itself: results do not depend on the number of
    threads, on how steps are fused, or on what else is in the batch beyond what the rule defines.
    """

    @property
    def name(self) -> str:
        """Name in the registry."""
        ...

    @property
    def settings(self) -> SettingValues:
        """All settings, resolved: defaults filled in."""
        ...

    @property
    def signals(self) -> tuple[str, ...]:
        """Names of the statistics that it reads."""
        ...

    @property
    def sparse_contributions(self) -> bool:
        """Whether a step may have rows without a contribution; else such rows are as good as not scored."""
        ...

    @property
    def columns(self) -> Mapping[str, torch.dtype]:
        """Names and element types of the tables; at most 16 bytes per example (of each row of a trajectory)."""
        ...

    @property
    def touches_all_rows(self) -> bool:
        """Whether a step may change rows other than its own."""
        ...

    @property
    def trajectory_rows(self) -> int:
        """T, number of rows of a trajectory, a policy for each training step; 0: the rule has one policy for all."""
        ...

    def init(self, num_examples: int, *, device: torch.device) -> TableState:
        """The uniform policy. On device `meta` its tables have shapes but no memory."""
        ...

    def init_slices(self, num_examples: int, *, device: torch.device) -> Slices[TableState]:
        """`init` in slices of about a million values; it raises when its first slice is asked for."""
        ...

    def touched_pages(self, state: TableState, statistics: Statistics) -> NDArray[np.int64] | slice:
        """Which pages a step may change, as an index into arrays [P]."""
        ...

    def max_log_bytes(self, state: TableState) -> int | None:
        """Bytes of log above which writing the pages is worth it for the rule; None: when the log outgrows the tables.

        A rule whose steps dirty few pages asks for less: a sweep then writes no more bytes than a later one would.
        """
        ...

    def check(self, statistics: Statistics) -> None:
        """Raises RuleError when the step lacks what the rule needs, or brings reference losses it does not read."""
        ...

    def prepare(self, state: TableState, statistics: Statistics) -> Scalars:
        """The step's scalars. Changes nothing. Raises RuleError when they are not finite."""
        ...

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
        ...

    def update(self, state: TableState, statistics: Statistics) -> TableState:
        """The next policy: `apply` with `prepare`'s scalars."""
        ...

    def replay(self, state: TableState, steps: Sequence[LoggedStatistics]) -> TableState:
        """`apply` of all steps one after another, to the last bit, but faster where steps can be fused.

        Raises what the `apply` that fails would raise; the state is not to be used then.
        """
        ...

    def restore(self, state: TableState) -> TableState:
        """Recomputes scored, raw_sum and raw_square_sum after tables were loaded. Exact.

        Raises RuleError when a table holds what the rule can never write (out of range, not finite).
        """
        ...

    def restore_slices(self, state: TableState) -> Slices[TableState]:
        """`restore` in slices; nobody else uses the state until the last one."""
        ...

    def weights(self, state: TableState, ids: NDArray[np.int64] | None) -> NDArray[np.float32]:
        """Served weights, mean 1 over N: float32 [len(ids)], or [N] for None; ids in [0, N), repeats allowed.

        Of a trajectory: the mean over its rows.
        """
        ...

    def trajectory_weights(self, state: TableState, rows: slice, ids: NDArray[np.int64] | None) -> NDArray[np.float32]:
        """Served weights of rows of a trajectory: float32 [rows, len(ids)], or [rows, N] for None.

        Raises RuleError when the rule has no trajectory.
        """
        ...

    def answer(
        self, state: TableState, statistics: Statistics | None, ids: NDArray[np.int64] | None
    ) -> NDArray[np.float32]:
        """Served weights as a step is answered; shapes as for `weights`.

        Table rules answer what a read answers. Batch rules weigh the step's own examples, and 1 elsewhere: the step
        was just applied to `state`, or was applied before and is sent again; then its statistics are weighed on the
        scale of now. A trajectory answers with the row of the step or read.

        Args:
            state: state after the step.
            statistics: the step; None or without rows: a read.
            ids: int64, in [0, N), repeats allowed; None: all N.
        """
        ...

    def scores(self, state: TableState, ids: NDArray[np.int64] | None) -> NDArray[np.float32]:
        """The rule's own statistic, NaN where never scored; shapes as for `weights`."""
        ...

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of what `read_kept` reads."""
        ...

    def read_kept(self, state: TableState, name: str, ids: NDArray[np.int64] | None) -> NDArray[np.float32]:
        """What else the rule keeps of each example, NaN where nothing; shapes as for `weights`.

        `loss` is its smoothed loss, nats; `stratum` the number of its stratum. Raises RuleError for what is not `kept`.
        """
        ...

    def strata(self, state: TableState) -> StrataReport | None:
        """The strata as they stand; None for rules without. Reads no table."""
        ...

    def above_floor(
        self, state: TableState, ids: NDArray[np.int64] | None, *, trajectory_row: int | None = None
    ) -> NDArray[np.bool_]:
        """Whether the raw weight is above the floor (never scored: yes); shapes as for `weights`.

        Args:
            state: the policy.
            ids: int64, in [0, N); None: all N.
            trajectory_row: which row of a trajectory; None: the rule has none.
        """
        ...

    def effective_examples(self, state: TableState) -> float:
        """1/Σγ² over the whole table, in [1, N] and O(1); for batch rules over the rows of the last step.

        Of a trajectory: the mean over its rows, in O(T).
        """
        ...

    def effective_ratio(self, state: TableState) -> float:
        """Effective examples over those among which the weight is spread, in (0, 1]; 1 is uniform.

        Among all N; for batch rules, whose weights have no meaning beyond a step, among the rows of the last one.
        """
        ...
