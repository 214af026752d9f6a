"""`strata`: examples with about the same loss have one weight, by the target's losses and contributions."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from equipoise_server.rules.arrays import gather, here, rows_of, scatter, table, there
from equipoise_server.rules.base import (
    PAGE_EXAMPLES,
    RuleError,
    Scalars,
    Statistics,
    StrataReport,
    Stratum,
    TableState,
)
from equipoise_server.rules.density_ratio import DensityRatio
from equipoise_server.rules.merits import Decision
from equipoise_server.rules.rule import Rule
from equipoise_server.rules.scale import MEAN_SQUARE, next_mean_square, scaled
from equipoise_server.rules.settings import MAX_DECAY, MIN_FLOOR, SignalSettings, flag, integer, number
from equipoise_server.rules.signals import check_finite, check_length, check_no_outcomes
from equipoise_server.rules.slices import SLICE_VALUES, Slices, fill
from equipoise_server.rules.strata_scalars import StrataScalars
from equipoise_server.rules.sums import spans
from equipoise_server.rules.weights import ONE, fixed_point

LOSS = "loss"
"""Column of the smoothed loss, nats, float32; 0 where none was reported."""
STRATUM = "stratum"
"""Column of the stratum: group times strata of a group, and which of these; -1: no loss was reported."""

MAX_CELLS = 1024
"""Strata of all groups: a step keeps 64 bytes of each in the log."""

MIN_RATIO = 1e-3
"""A density ratio below it has its logarithm."""

MAX_CONTRIBUTION = 3.0
"""Larger contributions, in units of the running RMS, count as this: no single one decides about a stratum."""

MAX_RISE = 30.0
"""Larger contributions, in units of the RMS before the step, count as this in the next: no single one makes all others
small. A scale that rises for good is met all the same, tenfold a step and faster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StrataSettings(SignalSettings):
    """Settings of `strata`."""

    guard: bool = flag(False)
    """Whether guard losses decide between the policy's weights and uniform ones. Not by default: weights act only where
    there is evidence, and a guard of 100 examples, which sees no more than noise of what they do in a short time, took
    away what they gained."""

    strata: float = integer(16, low=2, high=64)
    """S, strata of each group: quantiles of its smoothed losses."""

    groups: float = integer(1, low=1, high=512)
    """G, groups, such as labels or sources; strata times groups is at most 1024."""

    loss_decay: float = number(0.5, low=0.0, high=MAX_DECAY)
    """Decay per visit of an example's smoothed loss."""

    window: float = number(256.0, low=16.0, high=1e6)
    """How many losses of a group its quantiles remember: losses fall while a model learns, and only the present ones
    tell where an example stands."""

    memory: float = number(200.0, low=8.0, high=1e6)
    """How many contributions a stratum remembers."""

    min_count: float = number(150.0, low=2.0, high=1e6)
    """The strata of a group have full weight until a contribution's stratum has so many in the mean; one with less
    than a fifth of it keeps it. By default weights act after some 270 contributions to each: what strata differ in
    before that is mostly how a new model learns."""

    smoothing: float = number(0.5, low=0.0, high=1.0)
    """What a contribution to a neighbour, the stratum of the next higher or lower losses of the group, counts for in z:
    what is decided then follows the loss smoothly."""

    target_memory: float = number(1024.0, low=16.0, high=1e6)
    """How many losses of the target a group remembers, about."""

    min_target_losses: float = number(384.0, low=2.0, high=1e6)
    """With fewer losses of the target in its memory a group's strata are not compared with them: they are those of few
    examples, and while a model is new they differ by chance."""

    sharpness: float = number(4.0, low=0.0, high=16.0)
    """Power of the density ratio by which a stratum's weight is multiplied: 1 makes the distribution of the losses that
    of the target's; more leaves less of what is unlike the target."""

    lower_below: float = number(-2.2, low=-100.0, high=100.0)
    """z, mean contribution over its standard error, below which a stratum loses its weight."""

    raise_above: float = number(-0.8, low=-100.0, high=100.0)
    """z above which it has full weight, about; without `soft` it keeps between the two what it has."""

    soft: bool = flag(True)
    """Weights rise smoothly with z, from the floor to 1, half-way at the middle of the two bounds. False: there are two
    weights, and the bounds are thresholds with hysteresis; a stratum near them then comes and goes."""

    floor: float = number(0.02, low=MIN_FLOOR, high=1.0)
    """Smallest raw weight; 1/floor bounds the ratio of two weights."""


class Strata(Rule):
    """The weight of an example is that of its stratum: a quantile of the smoothed loss, within its group.

    Two things lower it. Where there are losses of target examples, a stratum is lowered in which they have a smaller
    share than the training examples: see `DensityRatio`. Where there are contributions, a stratum is whose mean is low.

    The loss of an example says a lot about it, but not whether that is good or bad. Losses of the target say so, and
    contributions do: under noise that hides it in a single one, and goes in the mean of a stratum. They should be
    norm-matched: their mean is then about 0, and its sign compares a stratum with all others. A step may have losses,
    contributions, or losses of all rows and contributions of some (NaN elsewhere; see `Rule` for what each public
    method promises).
    """

    name = "strata"
    signals = ("losses", "contributions")
    sparse_contributions = True
    kept: ClassVar[tuple[str, ...]] = (LOSS, STRATUM)

    def __init__(self, settings: StrataSettings) -> None:
        super().__init__(settings)
        self._settings = settings
        self._strata, self._groups = int(settings.strata), int(settings.groups)
        self._cells = self._strata * self._groups
        self._check_settings()
        self._decision = Decision(
            min_count=settings.min_count,
            lower_below=settings.lower_below,
            raise_above=settings.raise_above,
            soft=settings.soft,
            floor=fixed_point(settings.floor, ONE) / ONE,
            smoothing=settings.smoothing,
        )
        self._kept = StrataScalars(strata=self._strata, groups=self._groups, floor=self._decision.floor, rule=self.name)

    @property
    def columns(self) -> Mapping[str, torch.dtype]:
        """The smoothed loss and the stratum."""
        return {LOSS: torch.float32, STRATUM: torch.int32}

    def init_slices(self, num_examples: int, *, device: torch.device) -> Slices[TableState]:
        """Nobody in any stratum."""
        columns = {name: torch.empty(num_examples, dtype=dtype, device=device) for name, dtype in self.columns.items()}
        yield from fill(columns[LOSS], 0.0)
        yield from fill(columns[STRATUM], -1)
        return TableState(num_examples=num_examples, columns=columns, sizes=np.zeros(self._cells, np.int64))

    def check(self, statistics: Statistics) -> None:
        """Raises RuleError when the step has rows but neither losses nor contributions, or its groups do not fit."""
        if not statistics.size:
            return
        check_no_outcomes(statistics, signals=self.signals, rule=self.name)
        self._check_target(statistics)
        if statistics.losses is None and statistics.contributions is None:
            raise RuleError("losses", f"losses is absent: rule {self.name} needs losses or contributions in every step")
        if statistics.reference_losses is not None:
            raise RuleError("reference_losses", f"reference_losses: rule {self.name} does not use them; leave them out")
        groups = statistics.groups
        if groups is None:
            if self._groups > 1 and statistics.losses is not None:
                text = f"groups is absent: rule {self.name} with {self._groups} groups needs it with losses"
                raise RuleError("groups", text)
        elif len(groups) and groups.max() >= self._groups:
            row = int(np.argmax(groups >= self._groups))
            example = row if statistics.ids is None else int(statistics.ids[row])
            text = f"{groups[row]} of example {example}: rule {self.name} has groups [0, {self._groups})"
            raise RuleError("groups", f"groups = {text}")

    def _check_target(self, statistics: Statistics) -> None:
        groups = statistics.target_groups
        if statistics.target_losses is None:
            return
        if statistics.losses is None:
            text = f"target_losses: rule {self.name} compares them with losses, which are absent"
            raise RuleError("target_losses", text)
        if groups is not None and groups.max() >= self._groups:
            where = f"target_groups[{int(np.argmax(groups >= self._groups))}]"
            text = f"{where} = {groups.max()}: rule {self.name} has groups [0, {self._groups})"
            raise RuleError(where, text)

    def prepare(self, state: TableState, statistics: Statistics) -> Scalars:
        """All of what is kept beside the tables, with this step in it."""
        if not statistics.size:
            return dict(state.scalars)
        quantiles, merits = self._kept.quantiles(state.scalars), self._kept.merits(state.scalars)
        density = self._kept.density(state.scalars)
        losses, strata = self._rows(state, statistics)
        if statistics.losses is not None:
            groups = self._groups_of(statistics)
            density = self._compared(density, statistics, groups)
            quantiles = quantiles.after(losses.astype(np.float64), groups, window=self._settings.window)
            strata = groups * self._strata + quantiles.strata(losses.astype(np.float64), groups)
        mean_square = state.scalars.get(MEAN_SQUARE, 0.0)
        contributions = self._contributions(state, statistics)
        measured = ~np.isnan(contributions)
        if measured.any():
            mean_square = next_mean_square(
                mean_square,
                _held(contributions[measured], mean_square),
                decay=self._settings.rms_decay,
                name="contributions",
                rule=self.name,
            )
            told = measured & (strata >= 0)
            values = scaled(contributions[told], mean_square, rule=self.name, clip=True)
            values = values.clip(-MAX_CONTRIBUTION, MAX_CONTRIBUTION)
            merits = merits.after(values, strata[told], memory=self._settings.memory, decision=self._decision)
        return self._kept.pack(mean_square, quantiles, merits, density)

    def apply(
        self, state: TableState, statistics: Statistics, scalars: Scalars, *, pages: NDArray[np.bool_] | None = None
    ) -> TableState:
        """Moves the smoothed losses, and puts the step's examples into their strata."""
        self._kept.check(scalars)
        self._contributions(state, statistics)  # as many as there are examples
        if statistics.size and statistics.losses is not None:
            losses, before = self._rows(state, statistics)
            groups = self._groups_of(statistics)
            quantiles = self._kept.quantiles(scalars)
            after = groups * self._strata + quantiles.strata(losses.astype(np.float64), groups)
            ids = statistics.ids
            if pages is not None and not pages.all():
                ids = np.arange(state.num_examples) if ids is None else ids
                kept = pages[ids // PAGE_EXAMPLES]
                ids, losses, before, after = ids[kept], losses[kept], before[kept], after[kept]
            for name, values in ((LOSS, losses), (STRATUM, after.astype(np.int32))):
                column = table(state.columns[name])
                scatter(column, rows_of(column, ids), there(column, values))
            known = before >= 0
            joined = np.bincount(after, minlength=self._cells)
            state.sizes = state.sizes + joined - np.bincount(before[known], minlength=self._cells)
            state.scored += int(np.count_nonzero(~known))
        state.scalars = dict(scalars)
        return state

    def restore_slices(self, state: TableState) -> Slices[TableState]:
        """Checks tables and scalars, and counts who is in which stratum."""
        self._kept.check(state.scalars)
        for name, dtype in self.columns.items():
            column = state.columns.get(name)
            if column is None or column.dtype != dtype or column.shape != (state.num_examples,):
                raise RuleError(f"state.{name}", f"state.{name}: rule {self.name} needs {dtype} [{state.num_examples}]")
        sizes = np.zeros(self._cells, np.int64)
        for span in spans(state.num_examples, rows=SLICE_VALUES):
            losses, strata = (here(table(state.columns[name][span])) for name in (LOSS, STRATUM))
            for name, values, good in (
                (LOSS, losses, np.isfinite(losses)),
                (STRATUM, strata, (strata >= -1) & (strata < self._cells)),
            ):
                if not good.all():
                    first = int(np.argmin(good))
                    where = f"state.{name}[{span.start + first}]"
                    raise RuleError(f"state.{name}", f"{where} = {values[first]}: rule {self.name} never writes that")
            sizes += np.bincount(strata[strata >= 0], minlength=self._cells)
            yield
        state.sizes, state.scored = sizes, int(sizes.sum())
        return state

    def weights(self, state: TableState, ids: NDArray[np.int64] | None) -> NDArray[np.float32]:
        """The weight of the stratum, over the mean of all that are in one."""
        guard, served = state.guard_strength, np.append(self._served(state), 1.0)  # the last one is of stratum -1
        if guard:
            served = served * (1.0 - guard) + guard
        return np.asarray(served.astype(np.float32)[_read(state, STRATUM, ids)])

    def scores(self, state: TableState, ids: NDArray[np.int64] | None) -> NDArray[np.float32]:
        """z of the stratum, and the logarithm of what its density ratio leaves; NaN where no loss was reported."""
        z = self._kept.merits(state.scalars).z(self._decision)
        z = z + self._settings.sharpness * np.log(np.maximum(self._ratio(state.scalars), MIN_RATIO))
        return np.asarray(np.append(z, np.nan).astype(np.float32)[_read(state, STRATUM, ids)])

    def above_floor(
        self, state: TableState, ids: NDArray[np.int64] | None, *, trajectory_row: int | None = None
    ) -> NDArray[np.bool_]:
        """Whether the weight of the stratum is above the floor."""
        floor = self._decision.floor
        above = np.append((self._raw(state.scalars) > floor) | (floor == 1.0), True)
        return np.asarray(above[_read(state, STRATUM, ids)])

    def effective_examples(self, state: TableState) -> float:
        """(Σw)²/Σw², with w = 1 for examples without a stratum and the guard's mix."""
        served = self._served(state) * (1.0 - state.guard_strength) + state.guard_strength
        rest = float(state.num_examples - state.scored)
        total, squares = (math.fsum((state.sizes * served**power).tolist()) + rest for power in (1, 2))
        return min(max(total * total / squares, 1.0), float(state.num_examples))

    def read_kept(self, state: TableState, name: str, ids: NDArray[np.int64] | None) -> NDArray[np.float32]:
        """The smoothed loss, or the stratum."""
        if name not in self.kept:
            return super().read_kept(state, name, ids)
        values, strata = (_read(state, column, ids) for column in (name, STRATUM))
        return np.where(strata < 0, np.float32(np.nan), values.astype(np.float32))

    def strata(self, state: TableState) -> StrataReport:
        """All of them, as they stand."""
        quantiles, merits = self._kept.quantiles(state.scalars), self._kept.merits(state.scalars)
        errors = np.where(merits.count > 0.0, merits.errors, 0.0)
        z, ratio, guard = merits.z(self._decision), self._ratio(state.scalars), state.guard_strength
        served = self._served(state) * (1.0 - guard) + guard
        found = []
        for cell in range(self._cells):
            group, stratum = divmod(cell, self._strata)
            begins = stratum > 0 and quantiles.mass[group] > 0.0
            found.append(
                Stratum(
                    group=group,
                    stratum=stratum,
                    examples=int(state.sizes[cell]),
                    above_loss=float(quantiles.bounds[group, stratum - 1]) if begins else None,
                    contributions=float(merits.count[cell]),
                    mean=float(merits.means[cell]),
                    error=float(errors[cell]),
                    z=float(z[cell]),
                    ratio=float(ratio[cell]),
                    weight=float(served[cell]),
                )
            )
        return StrataReport(strata=tuple(found), contrast=merits.contrast(self._decision))

    def _compared(
        self, density: DensityRatio | None, statistics: Statistics, groups: NDArray[np.int64]
    ) -> DensityRatio | None:
        """With the losses of a step in it, if it has some of the target."""
        if statistics.target_losses is None or statistics.losses is None:
            return density
        before = density or DensityRatio.none(strata=self._strata, groups=self._groups)
        return before.after(
            statistics.losses.astype(np.float64),
            groups,
            target_losses=statistics.target_losses.astype(np.float64),
            target_groups=statistics.target_groups,
            memory=self._settings.target_memory,
        )

    def _ratio(self, scalars: Mapping[str, float]) -> NDArray[np.float64]:
        """Density ratio of each stratum, float64 [cells], in [0, 1]; 1 where the target told too little."""
        density, told = self._kept.density(scalars), self._settings
        if density is None:
            return np.ones(self._cells)
        return density.ratio(min_count=told.min_target_losses, smoothing=told.smoothing).ravel()

    def _raw(self, scalars: Mapping[str, float]) -> NDArray[np.float64]:
        """Raw weight of each stratum, float64 [cells], in [floor, 1], a multiple of 2^-30."""
        weight, ratio = self._kept.merits(scalars).weight, self._ratio(scalars)
        return np.asarray(
            np.maximum(np.rint(weight * ratio**self._settings.sharpness * ONE) / ONE, self._decision.floor)
        )

    def _check_settings(self) -> None:
        """Raises RuleError where settings contradict each other."""
        told = self._settings
        for name, fits, needed in (
            ("groups", self._cells <= MAX_CELLS, f"at most {MAX_CELLS} strata, and has {self._strata} in each group"),
            ("raise_above", told.raise_above >= told.lower_below, f"at least lower_below, {told.lower_below:g}"),
            ("memory", told.memory >= told.min_count, f"at least min_count, {told.min_count:g}"),
        ):
            if not fits:
                where = f"rule.settings.{name}"
                raise RuleError(where, f"{where} = {getattr(told, name):g}: rule {self.name} needs {needed}")

    def _served(self, state: TableState) -> NDArray[np.float64]:
        """Served weight of each stratum before the guard, float64 [cells]: mean 1 over the examples in them."""
        weight = self._raw(state.scalars)
        total = math.fsum((state.sizes * weight).tolist())
        return weight * (state.scored / total) if total else weight

    def _rows(self, state: TableState, statistics: Statistics) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The step's smoothed losses with this step in them, and the strata before it (-1: none), [B]."""
        old, strata = (_read(state, name, statistics.ids) for name in (LOSS, STRATUM))
        before = strata.astype(np.int64)
        given = statistics.losses
        if given is None:
            return old, before
        check_length(given, statistics, num_examples=state.num_examples, name="losses", rule=self.name)
        check_finite(given, name="losses", rule=self.name)
        decay = self._settings.loss_decay
        moved = old.astype(np.float64) * decay + given.astype(np.float64) * (1.0 - decay)
        return np.where(before < 0, given, moved.astype(np.float32)), before

    def _contributions(self, state: TableState, statistics: Statistics) -> NDArray[np.float32]:
        given = statistics.contributions
        if given is None:
            return np.full(statistics.size, np.nan, np.float32)
        return check_length(given, statistics, num_examples=state.num_examples, name="contributions", rule=self.name)

    def _groups_of(self, statistics: Statistics) -> NDArray[np.int64]:
        return np.zeros(statistics.size, np.int64) if statistics.groups is None else statistics.groups


def _read(state: TableState, name: str, ids: NDArray[np.int64] | None) -> NDArray[Any]:
    """Rows of a column on the host."""
    column = table(state.columns[name])
    return here(gather(column, rows_of(column, ids)))


def _held(contributions: NDArray[np.float32], mean_square: float) -> NDArray[np.float64]:
    """Contributions within `MAX_RISE` times the RMS so far; as they are while there is none."""
    reach = MAX_RISE * math.sqrt(mean_square) if mean_square else math.inf
    return contributions.astype(np.float64).clip(-reach, reach)
