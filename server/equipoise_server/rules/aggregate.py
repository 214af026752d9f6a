"""From the rows of a request to one entry per distinct id."""

import numpy as np
from numpy.typing import NDArray

from equipoise_server.rules.base import Statistics


def aggregate(
    ids: NDArray[np.int64] | None,
    contributions: NDArray[np.float32] | None,
    losses: NDArray[np.float32] | None,
    scored: NDArray[np.bool_] | None,
) -> Statistics:
    """The distinct ids with a scored row and the means of their statistics over these rows.

    Means are taken in float64 and rounded once. Without repeated ids the order of the request is kept, else ids come
    out sorted.

    Args:
        ids: int64 [rows]; None: all examples in order.
        contributions: float32 [rows], finite where scored; None: not sent.
        losses: float32 [rows], nats, finite where scored; None: not sent.
        scored: bool [rows]; rows that are False are ignored. None: all rows are scored.
    """
    if contributions is None and losses is None:
        return Statistics(ids=np.zeros(0, np.int64))
    if scored is not None and not scored.all():
        ids = np.flatnonzero(scored) if ids is None else ids[scored]
        contributions = None if contributions is None else contributions[scored]
        losses = None if losses is None else losses[scored]
    if ids is None or not _has_repeats(ids):
        return Statistics(ids=ids, contributions=contributions, losses=losses)
    distinct, entry = np.unique(ids, return_inverse=True)
    counts = np.bincount(entry)
    return Statistics(
        ids=distinct,
        contributions=None if contributions is None else _means(contributions, entry, counts),
        losses=None if losses is None else _means(losses, entry, counts),
    )


def _has_repeats(ids: NDArray[np.int64]) -> bool:
    ordered = np.sort(ids)
    return bool((ordered[1:] == ordered[:-1]).any())


def _means(values: NDArray[np.float32], entry: NDArray[np.intp], counts: NDArray[np.intp]) -> NDArray[np.float32]:
    return (np.bincount(entry, weights=values) / counts).astype(np.float32)
