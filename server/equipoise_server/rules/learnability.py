"""`learnability`: examples that the model solves now and then, from successes of attempts."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from equipoise_server.rules.arrays import Array, gather, here, namespace, rows_of, scatter, table, there
from equipoise_server.rules.base import PAGE_EXAMPLES, RuleError, Scalars, Statistics, TableState
from equipoise_server.rules.rule import Rule
from equipoise_server.rules.settings import MAX_DECAY, MIN_FLOOR, RuleSettings, number
from equipoise_server.rules.signals import check_signals
from equipoise_server.rules.slices import SLICE_VALUES, Slices, fill
from equipoise_server.rules.sums import change_sums, product_sum, spans, table_sums
from equipoise_server.rules.table import RAW
from equipoise_server.rules.weights import ONE, fixed_point

SUCCESSES = "successes"
"""Column of the successes that count, older ones less, float32."""
FAILURES = "failures"
"""Column of the failures that count, older ones less, float32."""
SEEN = "seen"
"""Column of the step in which the example had its last outcomes, int32; 0: never."""
TIME = "time"
"""Scalar: how many steps brought outcomes, a whole number; absent before the first."""

MAX_TIME = 2**31 - 1
"""Where time stands still: int32 holds it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnabilitySettings(RuleSettings):
    """Settings of `learnability`."""

    decay: float = number(0.5, low=0.0, high=MAX_DECAY)
    """What outcomes still count for when new ones of the example come: the model that had them was another one."""

    prior: float = number(0.1, low=0.01, high=100.0)
    """Successes and failures that every example is thought to have had beside its own. The less, the more a few
    outcomes say. What has no outcomes yet weighs more than what always fails or succeeds, and less than the rest."""

    exploration: float = number(0.1, low=0.0, high=1.0)
    """Share of all weight that goes to examples by how long they were not seen: their outcomes tell of an old model."""

    floor: float = number(0.02, low=MIN_FLOOR, high=1.0)
    """Smallest raw weight; without exploration 1/floor bounds the ratio of two weights."""


class Learnability(Rule):
    """w = (1-ρ)·r/mean(r) + ρ·age/mean(age): r from the variance p(1-p) of an outcome, age in steps since the last one.

    An example that always succeeds or always fails teaches a policy gradient nothing: its advantages are 0. The
    expected variance, under a Beta posterior of the success rate p whose old counts fade, says how much an example may
    teach now (p(1-p) as in Rutherford et al. 2024, arXiv 2408.15099; Foster and Foerster 2025, arXiv 2502.12272); the
    share by age is that of Prioritized Level Replay (Jiang et al. 2021, arXiv 2010.03934). Nothing seen, r is that of
    the prior. All sums are of integers and move by the step's rows alone (see `Rule` for what each public method
    promises).
    """

    name = "learnability"
    signals = ("successes", "attempts")

    def __init__(self, settings: LearnabilitySettings) -> None:
        super().__init__(settings)
        self._settings = settings
        self._floor = fixed_point(settings.floor)
        nothing = np.zeros(1)
        self._unseen = int(self._raw(nothing, nothing)[0])

    @property
    def columns(self) -> Mapping[str, torch.dtype]:
        """Successes, failures, the raw weight and when it was made."""
        return {SUCCESSES: torch.float32, FAILURES: torch.float32, RAW: torch.int32, SEEN: torch.int32}

    def init_slices(self, num_examples: int, *, device: torch.device) -> Slices[TableState]:
        """Nothing seen."""
        columns = {name: torch.empty(num_examples, dtype=dtype, device=device) for name, dtype in self.columns.items()}
        for name, column in columns.items():
            yield from fill(column, -1 if name == RAW else 0)
        return TableState(num_examples=num_examples, columns=columns, moments=(0, 0, 0))

    def check(self, statistics: Statistics) -> None:
        """Raises RuleError when the step has rows but no outcomes."""
        check_signals(statistics, signals=self.signals, rule=self.name)

    def prepare(self, state: TableState, statistics: Statistics) -> Scalars:
        """The time."""
        if not statistics.size:
            return dict(state.scalars)
        return {TIME: float(min(_time(state.scalars, self.name) + 1, MAX_TIME))}

    def apply(
        self, state: TableState, statistics: Statistics, scalars: Scalars, *, pages: NDArray[np.bool_] | None = None
    ) -> TableState:
        """Counts the outcomes of the step's rows, and makes their raw weights."""
        time = _time(scalars, self.name)
        if statistics.size:
            ids, successes, failures = self._outcomes(state, statistics, pages)
            columns = {name: table(column) for name, column in state.columns.items()}
            rows = rows_of(columns[RAW], ids)
            old = {name: gather(column, rows) for name, column in columns.items()}
            xp = namespace(old[RAW])
            new = {}
            for name, told in ((SUCCESSES, successes), (FAILURES, failures)):
                faded = xp.asarray(old[name], dtype=xp.float64) * self._settings.decay
                new[name] = xp.asarray(faded + there(faded, told), dtype=xp.float32)
            raw = self._raw(*(xp.asarray(counts, dtype=xp.float64) for counts in (new[SUCCESSES], new[FAILURES])))
            seen = xp.full_like(old[SEEN], time)
            scored, total, squares = change_sums(old[RAW], raw)
            moments = _added(state.moments, _moments(raw, seen), _moments(old[RAW], old[SEEN]))
            for name, values in {**new, RAW: raw, SEEN: seen}.items():
                scatter(columns[name], rows, values)
            state.scored += scored
            state.raw_sum += total
            state.raw_square_sum += squares
            state.moments = moments
        state.scalars = dict(scalars)
        return state

    def restore_slices(self, state: TableState) -> Slices[TableState]:
        """Checks tables and time, and recomputes the exact sums."""
        time = _time(state.scalars, self.name) + state.ahead  # a page that is ahead has seen what the log tells next
        for name, dtype in self.columns.items():
            column = state.columns.get(name)
            if column is None or column.dtype != dtype or column.shape != (state.num_examples,):
                raise RuleError(f"state.{name}", f"state.{name}: rule {self.name} needs {dtype} [{state.num_examples}]")
        scored = total = squares = 0
        moments = (0, 0, 0)
        rows = PAGE_EXAMPLES if state.device.type == "cpu" else SLICE_VALUES
        for span in spans(state.num_examples, rows=rows):
            part = {name: column[span] for name, column in state.columns.items()}
            self._check_span(part, time, span.start)
            sums = table_sums(part[RAW])
            scored, total, squares = scored + sums[0], total + sums[1], squares + sums[2]
            moments = _added(moments, _moments(part[RAW], part[SEEN]))
            yield
        state.scored, state.raw_sum, state.raw_square_sum, state.moments = scored, total, squares, moments
        return state

    def weights(self, state: TableState, ids: NDArray[np.int64] | None) -> NDArray[np.float32]:
        """Served weights."""
        raw, seen = self._gathered(state, ids, RAW, SEEN)
        per_raw, per_age = self._per_unit(state)
        time, guard, rest = _time(state.scalars, self.name), state.guard_strength, 0.0
        if per_age is None:
            per_age, rest = 0.0, self._settings.exploration
        xp = namespace(raw)
        raws = xp.asarray(xp.where(raw < 0, self._unseen, raw), dtype=xp.float64)
        weights = raws * per_raw + xp.asarray(time - seen, dtype=xp.float64) * per_age + rest
        if guard:
            weights = weights * (1.0 - guard) + guard
        return here(xp.asarray(weights, dtype=xp.float32))

    def scores(self, state: TableState, ids: NDArray[np.int64] | None) -> NDArray[np.float32]:
        """The expected success rate, in (0, 1); NaN where no outcome was told."""
        successes, failures, raw = self._gathered(state, ids, SUCCESSES, FAILURES, RAW)
        xp = namespace(raw)
        won, lost = (xp.asarray(counts, dtype=xp.float64) + self._settings.prior for counts in (successes, failures))
        return here(xp.asarray(xp.where(raw < 0, xp.nan, won / (won + lost)), dtype=xp.float32))

    def above_floor(
        self, state: TableState, ids: NDArray[np.int64] | None, *, trajectory_row: int | None = None
    ) -> NDArray[np.bool_]:
        """Whether the raw weight is above the floor; always so where the floor is 1."""
        (raw,) = self._gathered(state, ids, RAW)
        return here(raw != self._floor) if self._floor < ONE else np.ones(len(raw), np.bool_)

    def effective_examples(self, state: TableState) -> float:
        """(Σw)²/Σw² over all N, with the guard's mix expanded; from the exact sums alone."""
        size, time, share = state.num_examples, _time(state.scalars, self.name), self._settings.exploration
        seen, seen_squares, raw_by_seen = state.moments
        unseen = size - state.scored
        raw, ages = state.raw_sum + unseen * self._unseen, size * time - seen
        raw_squares = state.raw_square_sum + unseen * self._unseen**2
        age_squares = size * time * time - 2 * time * seen + seen_squares
        raw_by_age = time * raw - raw_by_seen
        # Each is Σ of a product of two weights of mean 1, over N; quotients of integers, rounded once.
        by_raw = size * raw_squares / raw**2
        by_both, by_age = (size * raw_by_age / (raw * ages), size * age_squares / ages**2) if ages else (1.0, 1.0)
        squares = (1.0 - share) ** 2 * by_raw + 2.0 * share * (1.0 - share) * by_both + share * share * by_age
        kept = 1.0 - state.guard_strength
        mixed = kept * kept * squares + (1.0 - kept * kept)
        return min(max(size / mixed, 1.0), float(size))

    def _per_unit(self, state: TableState) -> tuple[float, float | None]:
        """Served weight of one unit of raw weight, and of one step of age; None: all were seen in the last step."""
        size, share = state.num_examples, self._settings.exploration
        raw = state.raw_sum + (size - state.scored) * self._unseen
        ages = size * _time(state.scalars, self.name) - state.moments[0]
        return (1.0 - share) * (size / raw), share * (size / ages) if ages else None

    def _gathered(self, state: TableState, ids: NDArray[np.int64] | None, *names: str) -> list[Array]:
        """Rows of columns, by name; None: all."""
        columns = [table(state.columns[name]) for name in names]
        rows = rows_of(columns[0], ids)
        return [gather(column, rows) for column in columns]

    def _raw(self, successes: Array, failures: Array) -> Array:
        """4·E[p(1-p)] in units of 2^-30, at least the floor: int32 [B], for counts float64 [B]."""
        won, lost = successes + self._settings.prior, failures + self._settings.prior
        tried = won + lost
        expected = (4.0 * won * lost) / (tried * (tried + 1.0))
        xp = namespace(expected)
        return xp.asarray(xp.clip(xp.round(expected * ONE), self._floor, ONE), dtype=xp.int32)

    def _outcomes(
        self, state: TableState, statistics: Statistics, pages: NDArray[np.bool_] | None
    ) -> tuple[NDArray[np.int64] | None, NDArray[np.float64], NDArray[np.float64]]:
        """The step's ids (None: all), successes and failures, restricted to `pages`."""
        won, tried, ids = statistics.successes, statistics.attempts, statistics.ids
        if won is None or tried is None:
            raise RuleError("attempts", f"attempts is absent: rule {self.name} needs it in every step")
        rows = state.num_examples if ids is None else len(ids)
        for name, values, good in (
            ("successes", won, len(won) == rows),
            ("attempts", tried, len(tried) == rows),
        ):
            if not good:
                text = f"{name} has {len(values)} values for {rows} examples: not one each for rule {self.name}"
                raise RuleError(name, text)
        bad = (tried < 1) | (won < 0) | (won > tried)
        if bad.any():
            row = int(np.argmax(bad))
            text = f"successes[{row}] = {won[row]} of {tried[row]} attempts: rule {self.name} needs 1 attempt or more"
            raise RuleError("successes", f"{text}, and successes among them")
        lost = tried - won
        if pages is not None and not pages.all():
            ids = np.arange(state.num_examples) if ids is None else ids
            kept = pages[ids // PAGE_EXAMPLES]
            ids, won, lost = ids[kept], won[kept], lost[kept]
        return ids, won.astype(np.float64), lost.astype(np.float64)

    def _check_span(self, part: Mapping[str, torch.Tensor], time: int, offset: int) -> None:
        """Raises RuleError where a table holds what the rule never writes."""
        raw, seen = part[RAW], part[SEEN]
        unseen = raw == -1
        good = {name: torch.isfinite(part[name]) & (part[name] >= 0.0) for name in (SUCCESSES, FAILURES)}
        good[RAW] = unseen | ((raw >= self._floor) & (raw <= ONE))
        good[SEEN] = torch.where(unseen, seen == 0, (seen >= 1) & (seen <= time))
        for name, fine in good.items():
            if not bool(fine.all()):
                first = int((~fine).nonzero()[0])
                where = f"state.{name}[{offset + first}]"
                raise RuleError(
                    f"state.{name}", f"{where} = {part[name][first].item()}: rule {self.name} never writes that"
                )


def _time(scalars: Mapping[str, float], rule: str) -> int:
    """Steps with outcomes so far. Raises RuleError unless it is a whole number that int32 holds."""
    time = scalars.get(TIME, 0.0)
    if not (0.0 <= time <= MAX_TIME and float(time).is_integer()):
        raise RuleError(TIME, f"{TIME} = {time}: rule {rule} needs an integer in [0, {MAX_TIME}]")
    return int(time)


def _moments(raw: Array, seen: Array) -> tuple[int, int, int]:
    """Σ seen, Σ seen² and Σ raw·seen of rows, exact; `seen` is 0 where there is no raw weight."""
    xp = namespace(raw)
    return product_sum(seen, xp.ones_like(seen)), product_sum(seen, seen), product_sum(xp.clip(raw, 0, ONE), seen)


def _added(moments: tuple[int, ...], new: tuple[int, ...], old: tuple[int, ...] = (0, 0, 0)) -> tuple[int, int, int]:
    first, second, third = (a + b - c for a, b, c in zip(moments, new, old, strict=True))
    return first, second, third
