"""Which sequences a step trains on: a function of seed and step alone, so that a resumed run needs no loader state."""

import numpy as np
from numpy.typing import NDArray


class ShuffledBatches:
    """Batches of `batch_size` of `size` sequences; every epoch is a new order, and a batch may span two.

    Args:
        size: how many sequences there are.
        batch_size: B.
        seed: of the orders.
    """

    def __init__(self, size: int, *, batch_size: int, seed: int) -> None:
        self._size = size
        self._batch_size = batch_size
        self._seed = seed
        self._orders: dict[int, NDArray[np.int64]] = {}

    def at(self, step: int) -> NDArray[np.int64]:
        """Indices of step `step`, from 0: int64 [B]."""
        places = np.arange(step * self._batch_size, (step + 1) * self._batch_size)
        epochs = places // self._size
        self._orders = {epoch: self._order(epoch) for epoch in np.unique(epochs).tolist()}
        pairs = zip(epochs.tolist(), (places % self._size).tolist(), strict=True)
        return np.array([self._orders[epoch][place] for epoch, place in pairs])

    def _order(self, epoch: int) -> NDArray[np.int64]:
        known = self._orders.get(epoch)
        if known is not None:
            return known
        return np.random.default_rng((self._seed, epoch)).permutation(self._size).astype(np.int64)
