"""From the rows of a request to one entry per distinct id."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from equipoise_server.rules.base import RuleError, Statistics
from equipoise_server.rules.order import group_starts, has_repeats, stable_order


def aggregate(
    ids: NDArray[np.int64] | None = None,
    contributions: NDArray[np.float32] | None = None,
    losses: NDArray[np.float32] | None = None,
    scored: NDArray[np.bool_] | None = None,
    *,
    reference_losses: NDArray[np.float32] | None = None,
    groups: NDArray[np.int64] | None = None,
    successes: NDArray[np.int64] | None = None,
    attempts: NDArray[np.int64] | None = None,
    measured: NDArray[np.bool_] | None = None,
    trajectory_row: int | None = None,
) -> Statistics:
    """The distinct ids with a scored row and the means of their statistics over these rows; outcomes add up.

    Means are taken in float64 and rounded once. Without repeated ids the order of the request is kept, else ids come
    out sorted.

    Args:
        ids: int64 [rows]; None: all examples in order.
        contributions: float32 [rows], finite where scored; None: not sent.
        losses: float32 [rows], nats, finite where scored; None: not sent.
        scored: bool [rows]; rows that are False are ignored. None: all rows are scored.
        reference_losses: float32 [rows], nats, finite where scored; None: not sent.
        groups: int64 [rows]: the group of each row's example; None: not sent.
        successes: int64 [rows], in [0, attempts] where scored; None: not sent.
        attempts: int64 [rows], at least 1 where scored; None: not sent.
        measured: bool [rows]; contributions of rows that are False are ignored, and NaN for an id without others. None:
            all rows have one.
        trajectory_row: row of a trajectory that the request is about; None: the rule has no trajectory.

    Raises RuleError when rows of one id are of several groups.
    """
    if contributions is None and losses is None and reference_losses is None and attempts is None:
        return Statistics(ids=np.zeros(0, np.int64), trajectory_row=trajectory_row)
    if measured is not None and contributions is not None:
        contributions = np.where(measured, contributions, np.float32(np.nan))
    rows = Statistics(
        ids=ids,
        contributions=contributions,
        losses=losses,
        reference_losses=reference_losses,
        groups=groups,
        successes=successes,
        attempts=attempts,
        trajectory_row=trajectory_row,
    )
    if ids is not None and has_repeats(ids):
        order = stable_order(ids)
        ordered = ids[order]
        return _averaged(rows, scored, order, ordered, group_starts(ordered))
    if scored is not None and not scored.all():
        kept = np.flatnonzero(scored) if ids is None else ids[scored]
        rows = replace(
            _mapped(rows, lambda values: values[scored]),
            ids=kept,
            groups=_of_rows(groups, scored),
            successes=_of_rows(successes, scored),
            attempts=_of_rows(attempts, scored),
        )
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

    def total(values: NDArray[np.int64] | None) -> NDArray[np.int64] | None:
        if values is None:
            return None
        sums = np.zeros(len(starts), np.int64)
        np.add.at(sums, entry, values[order])
        return sums[kept]

    averaged = replace(_mapped(rows, mean), successes=total(rows.successes), attempts=total(rows.attempts))
    if rows.contributions is not None and np.isnan(rows.contributions[order]).any():
        averaged = replace(averaged, contributions=_measured_mean(rows.contributions[order], entry, kept))
    groups = None if rows.groups is None else _common_groups(rows.groups, order, entry, ordered[starts], kept)
    return replace(averaged, ids=ordered[starts[kept]], counts=counts[kept], groups=groups)


def _measured_mean(
    values: NDArray[np.float32], entry: NDArray[np.int64], kept: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Means over the values that are not NaN, [kept]; NaN for an entry without any."""
    there = ~np.isnan(values)
    size = int(kept.max()) + 1 if len(kept) else 0
    counts = np.bincount(entry[there], minlength=size)[kept]
    sums = np.bincount(entry[there], weights=values[there], minlength=size)[kept]
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan).astype(np.float32)


def _common_groups(
    groups: NDArray[np.int64],
    order: NDArray[np.int64],
    entry: NDArray[np.int64],
    ids: NDArray[np.int64],
    kept: NDArray[np.int64],
) -> NDArray[np.int64]:
    """The group of each entry, [kept]. Raises RuleError when its scored rows differ."""
    common = np.zeros(len(ids), np.int64)
    common[entry] = groups[order]
    differs = common[entry] != groups[order]
    if differs.any():
        first = int(np.argmax(differs))
        row, example = int(order[first]), int(ids[entry[first]])
        where = f"groups[{row}]"
        text = f"{groups[row]}, but example {example} has a row of group {common[entry[first]]}: one group an example"
        raise RuleError(where, f"{where} = {text}")
    return common[kept]


def _of_rows(values: NDArray[np.int64] | None, rows: NDArray[np.bool_]) -> NDArray[np.int64] | None:
    return None if values is None else values[rows]


def _mapped(rows: Statistics, call: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> Statistics:
    return replace(
        rows,
        contributions=None if rows.contributions is None else call(rows.contributions),
        losses=None if rows.losses is None else call(rows.losses),
        reference_losses=None if rows.reference_losses is None else call(rows.reference_losses),
    )
