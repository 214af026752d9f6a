"""From the rows of a request to one entry per distinct id."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from equipoise_server.rules.base import Statistics


def aggregate(
    ids: NDArray[np.int64] | None = None,
    contributions: NDArray[np.float32] | None = None,
    losses: NDArray[np.float32] | None = None,
    scored: NDArray[np.bool_] | None = None,
    *,
    reference_losses: NDArray[np.float32] | None = None,
    trajectory_row: int | None = None,
) -> Statistics:
    """The distinct ids with a scored row and the means of their statistics over these rows.

    Means are taken in float64 and rounded once. Without repeated ids the order of the request is kept, else ids come
    out sorted.

    Args:
        ids: int64 [rows]; None: all examples in order.
        contributions: float32 [rows], finite where scored; None: not sent.
        losses: float32 [rows], nats, finite where scored; None: not sent.
        scored: bool [rows]; rows that are False are ignored. None: all rows are scored.
        reference_losses: float32 [rows], nats, finite where scored; None: not sent.
        trajectory_row: row of a trajectory that the request is about; None: the rule has no trajectory.
    """
    if contributions is None and losses is None and reference_losses is None:
        return Statistics(ids=np.zeros(0, np.int64), trajectory_row=trajectory_row)
    rows = Statistics(
        ids=ids,
        contributions=contributions,
        losses=losses,
        reference_losses=reference_losses,
        trajectory_row=trajectory_row,
    )
    if scored is not None and not scored.all():
        kept = np.flatnonzero(scored) if ids is None else ids[scored]
        rows = replace(_mapped(rows, lambda values: values[scored]), ids=kept)
    if ids is None or rows.ids is None or not _has_repeats(ids):
        return rows
    distinct, entry = np.unique(rows.ids, return_inverse=True)
    scored_rows = np.bincount(entry)
    means = _mapped(rows, lambda values: (np.bincount(entry, weights=values) / scored_rows).astype(np.float32))
    return replace(means, ids=distinct, counts=_occurrences(distinct, ids))


def _mapped(rows: Statistics, call: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> Statistics:
    return replace(
        rows,
        contributions=None if rows.contributions is None else call(rows.contributions),
        losses=None if rows.losses is None else call(rows.losses),
        reference_losses=None if rows.reference_losses is None else call(rows.reference_losses),
    )


def _has_repeats(ids: NDArray[np.int64]) -> bool:
    ordered = np.sort(ids)
    return bool((ordered[1:] == ordered[:-1]).any())


def _occurrences(distinct: NDArray[np.int64], ids: NDArray[np.int64]) -> NDArray[np.int64]:
    ordered = np.sort(ids)
    ends, starts = (np.searchsorted(ordered, distinct, side=side) for side in ("right", "left"))
    return ends - starts
