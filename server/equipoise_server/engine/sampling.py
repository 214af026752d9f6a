"""Drawing examples by weight, in one or two passes over a snapshot."""

import numpy as np
from numpy.typing import NDArray

from equipoise_server.engine.snapshot import Snapshot
from equipoise_server.errors import invalid
from equipoise_server.rules import PAGE_EXAMPLES, Slices


def draw(
    snapshot: Snapshot, count: int, *, num_examples: int, with_replacement: bool, seed: int
) -> Slices[NDArray[np.int64]]:
    """Ids drawn with probability proportional to the served weights, int64 [count]; equal arguments give equal ids.

    Raises ServiceError (OUT_OF_RANGE_VALUE) when there are fewer than `count` examples of non-zero weight, without
    replacement.
    """
    yield from snapshot.prepare_weights()
    random = np.random.Generator(np.random.PCG64(seed))
    starts = range(0, num_examples, PAGE_EXAMPLES)
    if with_replacement:
        return (yield from _repeatedly(snapshot, count, starts, random))
    return (yield from _distinct(snapshot, count, starts, random))


def _repeatedly(
    snapshot: Snapshot, count: int, starts: range, random: np.random.Generator
) -> Slices[NDArray[np.int64]]:
    """Points on the line of all weights: a first pass finds the page of each, a second the example in it."""
    sums = np.zeros(len(starts))
    for page, start in enumerate(starts):
        sums[page] = snapshot.weights(start).sum(dtype=np.float64)
        yield
    ends = np.cumsum(sums)
    points = random.random(count) * ends[-1]
    pages = np.minimum(np.searchsorted(ends, points, side="right"), np.flatnonzero(sums)[-1])
    order = np.argsort(pages, kind="stable")
    drawn = np.empty(count, np.int64)
    for rows in np.split(order, np.flatnonzero(np.diff(pages[order])) + 1):
        page = int(pages[rows[0]])
        weights = snapshot.weights(starts[page])
        within = np.searchsorted(
            np.cumsum(weights, dtype=np.float64), points[rows] - (ends[page] - sums[page]), side="right"
        )
        drawn[rows] = starts[page] + np.minimum(within, np.flatnonzero(weights)[-1])  # against the last rounding
        yield
    return drawn


def _distinct(snapshot: Snapshot, count: int, starts: range, random: np.random.Generator) -> Slices[NDArray[np.int64]]:
    """The `count` largest of E_n^(1/w_n), E uniform, in that order (Efraimidis and Spirakis 2006)."""
    keys, ids = np.empty(0), np.empty(0, np.int64)
    positive = 0
    for start in starts:
        weights = snapshot.weights(start)
        positive += int(np.count_nonzero(weights))
        with np.errstate(divide="ignore"):
            found = np.where(weights > 0, -random.exponential(size=len(weights)) / weights, -np.inf)
        better = np.flatnonzero(found > keys.min(initial=np.inf)) if len(keys) == count else np.flatnonzero(weights)
        keys, ids = np.concatenate([keys, found[better]]), np.concatenate([ids, start + better])
        if len(keys) > count:
            largest = np.argpartition(keys, len(keys) - count)[len(keys) - count :]
            keys, ids = keys[largest], ids[largest]
        yield
    if count > positive:
        description = f"{count} without replacement, but only {positive} examples have a weight above 0"
        raise invalid("OUT_OF_RANGE_VALUE", "count", description)
    return ids[np.argsort(-keys, kind="stable")]
