"""What goes into a rule and comes out of it: statistics, scalars, and a state of tables.

Shape legend: N examples of the policy, B distinct scored ids of one step, R rows of its tables (the N examples, or the
T rows of a trajectory), P pages of `page_rows` rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from equipoise_server.rules.guard import Guard
from equipoise_server.values import value

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


@value
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
        target_losses: float32 [A], nats, finite: of single examples of the target; None where the trainer sent none.
        target_groups: int64 [A], >= 0: their groups; None where the trainer sent none.
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
    target_losses: NDArray[np.float32] | None = None
    target_groups: NDArray[np.int64] | None = None
    counts: NDArray[np.int64] | None = None
    trajectory_row: int | None = None

    @property
    def size(self) -> int:
        """B, the number of distinct scored ids (0: the step carries no rows)."""
        for values in (self.contributions, self.losses, self.reference_losses, self.attempts):
            if values is not None:
                return len(values)
        return 0

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        given = (self.ids, self.contributions, self.losses, self.reference_losses, self.target_losses)
        counted = (self.groups, self.successes, self.attempts, self.counts, self.target_groups)
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
        z: mean over error, of it and its neighbours; 0 where there are too few contributions.
        ratio: the target's share of losses in it over its own, at most 1; 1 where the target told too little.
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
    ratio: float
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
        ahead: by how many steps some page may be ahead of the scalars, while a policy is being loaded.
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
    ahead: int = 0

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
