"""From the rows of a request to one entry per distinct id."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from equipoise_server.rules.base import Statistics
from equipoise_server.rules.order import group_starts, stable_order


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
    if ids is not None:
        order = stable_order(ids)
        ordered = ids[order]
        starts = group_starts(ordered)
        if len(starts) < len(ids):
            return _averaged(rows, scored, order, ordered, starts)
    if scored is not None and not scored.all():
        kept = np.flatnonzero(scored) if ids is None else ids[scored]
        rows = replace(_mapped(rows, lambda values: values[scored]), ids=kept)
    return rows


def _averaged(
    rows: Statistics,
    scored: NDArray[np.bool_] | None,
    order: NDArray[np.int64],
    ordered: NDArray[np.int64],
    starts: NDArray[np.int64],
) -> Statistics:
    """One entry per distinct id with a scored row; rows of an id are added up in the order of the request."""
    counts = np.diff(starts, append=len(ordered))
    entry = np.repeat(np.arange(len(starts)), counts)
    if scored is not None and not scored.all():
        in_order = scored[order]
        order, entry = order[in_order], entry[in_order]
    scored_rows = np.bincount(entry, minlength=len(starts))
    kept = np.flatnonzero(scored_rows)
    scored_rows = scored_rows[kept]

    def mean(values: NDArray[np.float32]) -> NDArray[np.float32]:
        sums = np.bincount(entry, weights=values[order], minlength=len(starts))[kept]
        return (sums / scored_rows).astype(np.float32)

    return replace(_mapped(rows, mean), ids=ordered[starts[kept]], counts=counts[kept])


def _mapped(rows: Statistics, call: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> Statistics:
    return replace(
        rows,
        contributions=None if rows.contributions is None else call(rows.contributions),
        losses=None if rows.losses is None else call(rows.losses),
        reference_losses=None if rows.reference_losses is None else call(rows.reference_losses),
    )
