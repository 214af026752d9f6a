"""Drawing examples by weight."""

import numpy as np
from numpy.typing import NDArray

from equipoise_server.errors import invalid


def draw(weights: NDArray[np.float32], count: int, *, with_replacement: bool, seed: int) -> NDArray[np.int64]:
    """Ids drawn with probability proportional to `weights` [N]; equal arguments give equal ids.

    Without replacement: the `count` largest of E_n^(1/w_n), E uniform (Efraimidis and Spirakis 2006), in that order.
    Raises ServiceError (OUT_OF_RANGE_VALUE) when there are fewer than `count` examples of non-zero weight.
    """
    random = np.random.Generator(np.random.PCG64(seed))
    if with_replacement:
        cumulated = np.cumsum(weights, dtype=np.float64)
        points = random.random(count) * cumulated[-1]
        drawn: NDArray[np.int64] = np.searchsorted(cumulated, points, side="right").astype(np.int64)
        return drawn
    positive = int(np.count_nonzero(weights))
    if count > positive:
        description = f"{count} without replacement, but only {positive} examples have a weight above 0"
        raise invalid("OUT_OF_RANGE_VALUE", "count", description)
    with np.errstate(divide="ignore"):
        keys = np.where(weights > 0, -random.exponential(size=len(weights)) / weights, -np.inf)
    largest = np.argpartition(keys, len(keys) - count)[len(keys) - count :]
    return largest[np.argsort(-keys[largest], kind="stable")].astype(np.int64)
