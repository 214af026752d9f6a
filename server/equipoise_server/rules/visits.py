"""Visits: the rows of many logged steps, grouped by example, so that a row update runs once for many of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise_server.rules.base import PAGE_EXAMPLES, LoggedStatistics, RuleError, Statistics
from equipoise_server.rules.order import group_starts, stable_order

MAX_ROWS = 1 << 16
"""Rows that are joined at once: their temporaries stay in the cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinedSteps:
    """The rows of several steps, one step after another; M in all.

    Attributes:
        ids: int64 [M]; steps may have ids in common.
        statistics: all rows as if they were of one step.
        scalars: the scalars of each row's step by name, float64 [M]; 0 where the step has none of that name.
        kept: bool [M], rows on pages that lack their step; None: all.
    """

    ids: NDArray[np.int64]
    statistics: Statistics
    scalars: dict[str, NDArray[np.float64]]
    kept: NDArray[np.bool_] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Visits:
    """Rows by example and by which visit of the example they are. G examples, M visits.

    Attributes:
        ids: int64 [G], distinct, the most visited first.
        signal: float64 [M]: of the first visit of every example, then of the second visit of those that have one, ...
        sizes: how many examples have a first, a second, ... visit; falling, of sum M.
    """

    ids: NDArray[np.int64]
    signal: NDArray[np.float64]
    sizes: list[int]


def runs(steps: Sequence[LoggedStatistics]) -> Iterator[list[LoggedStatistics]]:
    """Consecutive steps that may be joined: of at most `MAX_ROWS` rows, or one step alone that has more, or all."""
    run: list[LoggedStatistics] = []
    rows = 0
    for step in steps:
        ids = step.statistics.ids
        size = MAX_ROWS + 1 if ids is None else len(ids)
        if run and rows + size > MAX_ROWS:
            yield run
            run, rows = [], 0
        run.append(step)
        rows += size
    if run:
        yield run


def join(steps: Sequence[LoggedStatistics], *, signals: Sequence[str], rule: str) -> JoinedSteps:
    """The rows of steps that all have some, with ids.

    Raises RuleError when one of them lacks a statistic of `signals` or has another number of them than ids, and
    IndexError when an id is on no page of a step's `pages`.
    """
    told = [step.statistics for step in steps]
    parts = [each.ids for each in told if each.ids is not None]
    sizes = [len(ids) for ids in parts]
    joined: dict[str, Any] = {}
    for name in signals:
        given = [values for each in told if (values := getattr(each, name)) is not None]
        if [len(values) for values in given] != sizes:
            raise RuleError(name, f"{name}: not one value for each example in all steps of rule {rule}")
        joined[name] = np.concatenate(given)
    ids = np.concatenate(parts)
    names = set().union(*(step.scalars for step in steps))
    scalars = {
        name: np.repeat(np.array([step.scalars.get(name, 0.0) for step in steps], np.float64), sizes)
        for name in sorted(names)
    }
    return JoinedSteps(ids=ids, statistics=Statistics(ids=ids, **joined), scalars=scalars, kept=_kept(steps, ids))


def by_visit(ids: NDArray[np.int64], signal: NDArray[np.float64], *, kept: NDArray[np.bool_] | None = None) -> Visits:
    """Visits from rows in order: ids [rows] in [0, N), their signal [rows]; of the rows that are `kept`, if given."""
    if kept is not None:
        ids, signal = ids[kept], signal[kept]
    order = stable_order(ids)
    ordered = ids[order]
    starts = group_starts(ordered)
    counts = np.diff(starts, append=len(ids))
    if len(starts) == len(ids):
        return Visits(ids=ordered, signal=signal[order], sizes=[len(ids)] if len(ids) else [])
    most = int(counts.max())
    starts = starts[stable_order(most - counts)]
    reached = np.cumsum(np.bincount(counts)[::-1])[::-1]  # how many examples have at least so many visits
    sizes = reached[1:].tolist()
    rows = np.concatenate([starts[:size] + visit for visit, size in enumerate(sizes)])
    return Visits(ids=ordered[starts], signal=signal[order[rows]], sizes=sizes)


def _kept(steps: Sequence[LoggedStatistics], ids: NDArray[np.int64]) -> NDArray[np.bool_] | None:
    if all(step.pages is None for step in steps):
        return None
    kept = np.ones(len(ids), np.bool_)
    of_page = ids // PAGE_EXAMPLES
    start = 0
    for step in steps:
        stop = start + (0 if step.statistics.ids is None else len(step.statistics.ids))
        if step.pages is not None:
            kept[start:stop] = step.pages[of_page[start:stop]]
        start = stop
    return kept
