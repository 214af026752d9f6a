"""The newest weight of each example, in bounded memory.

One slot per example while they all fit; beyond that, examples share slots and a new weight takes the place of an older
one. A strict least-recently-used order would cost a dictionary operation per row; this costs three array operations
per response.
"""

import numpy as np
from numpy.typing import NDArray


class WeightsCache:
    """Newest weight and version per example.

    Args:
        capacity: most examples it can hold.
    """

    def __init__(self, *, capacity: int) -> None:
        self._capacity = capacity
        self._size = 0

    def resize(self, num_examples: int) -> None:
        """Makes room for a policy of this many examples; keeps what it holds when the size is the same."""
        size = min(num_examples, self._capacity)
        if size != self._size:
            self._size = size
            self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        # Zeroed memory is not touched until it is written: a huge policy costs what is used of it.
        self._owners = np.zeros(self._size, np.uint64)  # id + 1; 0: empty
        self._weights = np.zeros(self._size, np.float32)
        self._versions = np.zeros(self._size, np.uint64)

    def store(self, ids: NDArray[np.uint64], weights: NDArray[np.float32], *, version: int) -> None:
        """Remembers the weights [B] of ids [B], unless a newer version of the slot is known."""
        if not self._size:
            return
        slots = ids % np.uint64(self._size)
        newer = self._versions[slots] <= version
        if not newer.all():
            slots, ids, weights = slots[newer], ids[newer], weights[newer]
        self._owners[slots] = ids + np.uint64(1)
        self._weights[slots] = weights
        self._versions[slots] = version

    def lookup(self, ids: NDArray[np.uint64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Weights [B] of ids [B], 1 where unknown; and whether each is known."""
        if not self._size:
            return np.ones(len(ids), np.float32), np.zeros(len(ids), np.bool_)
        slots = ids % np.uint64(self._size)
        known = self._owners[slots] == ids + np.uint64(1)
        return np.where(known, self._weights[slots], np.float32(1)), known
