"""The one sequence of draws of a mixture, the same in all processes, made in stretches of equal shares.

Shape legend: S sources.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from equipoise.torch.shares import UNLIMITED, apportioned
from equipoise.torch.sources import MixedDataset


class Told(TypedDict):
    """What all processes agree on before a stretch is drawn; tensors, so that `torch.load` takes it.

    Attributes:
        number: of the stretch, from 0, over the run.
        shares: of the sources, float64 [S].
        lengths: of the sources, int64 [S]; -1: not known, and more than this stretch can reach.
        version: of the policy.
        epoch: of the policy.
    """

    number: int
    shares: Tensor
    lengths: Tensor
    version: int
    epoch: int


class Begun(TypedDict):
    """Where a stretch begins: `start` in its epoch, with so many draws of each source before it, int64 [S]."""

    number: int
    start: int
    counts: Tensor


class Stretches:
    """The draws of one epoch after another.

    Within a source, rows with places come in a random order, another one in each pass, and each once in a pass; a
    stream keeps its order. A stretch has of each source its share of the draws, rounded up or down, in random order.
    Everything follows from the seed, the shares and lengths that were agreed on, and the numbers of stretch and epoch.

    Args:
        dataset: the sources.
        num_sources: S.
        seed: of all random numbers.
        size: draws in a stretch.
        repeats: whether a source that is over begins again; else it is out until the next epoch.

    Attributes:
        counts: draws of each source, [S]: of the run, or where nothing is repeated of the epoch.
        agreed: what was agreed on for this epoch, by stretch. A state that was saved ahead of its use, as by a loader
            with workers, shares it: what is agreed on until the state is written belongs to it.
    """

    def __init__(self, dataset: MixedDataset, *, num_sources: int, seed: int, size: int, repeats: bool) -> None:
        self.counts = np.zeros(num_sources, dtype=np.int64)
        self.agreed: list[Told] = []
        self._dataset = dataset
        self._seed = seed
        self._size = size
        self._repeats = repeats
        self._epoch = 0
        self._number = 0
        self._end = 0
        self._begun: list[Begun] = []
        self._known: dict[int, Told] = {}
        self._drawn: list[tuple[int, NDArray[np.int64]]] = []
        self._orders: dict[int, tuple[tuple[int, int], NDArray[np.int64]]] = {}

    @property
    def number(self) -> int:
        """Of the next stretch."""
        return self._number

    @property
    def end(self) -> int:
        """How many draws of the epoch are made."""
        return self._end

    def begin(self, epoch: int) -> None:
        """Begins an epoch."""
        self._epoch, self._end = epoch, 0
        self.agreed, self._begun, self._drawn, self._known = [], [], [], {}
        if not self._repeats:
            self.counts = np.zeros_like(self.counts)

    def extend(self, end: int, total: int, told: Callable[[int], Told]) -> bool:
        """Makes the draws before `end`, of an epoch of `total`; False: all sources are over before.

        Args:
            end: a place in the epoch.
            total: draws in the epoch.
            told: says what all agree on for a stretch of this number; asked in the same order by all.
        """
        while self._end < end:
            agreed = self._known.get(self._number) or told(self._number)
            if not self._draw(agreed, min(self._size, total - self._end)):
                return False
            self.agreed.append(agreed)
        return True

    def at(self, position: int) -> int:
        """The place in the dataset of the draw at a position of the epoch that was made and not forgotten."""
        start, places = next(found for found in reversed(self._drawn) if found[0] <= position)
        return int(places[position - start])

    def forget(self, used: int, remembered: int) -> None:
        """Draws before `used` are not asked for again; of those before `remembered` no state is."""
        while len(self._drawn) > 1 and self._drawn[1][0] <= used:
            del self._drawn[0]
        while len(self._begun) > 1 and self._begun[1]["start"] <= remembered:
            del self._begun[0], self.agreed[0]

    def begun_before(self, position: int) -> Begun:
        """The stretch in which a position of the epoch is; of what is not drawn yet, the one that comes."""
        coming: Begun = {"number": self._number, "start": self._end, "counts": torch.from_numpy(self.counts.copy())}
        return next((begun for begun in reversed([*self._begun, coming]) if begun["start"] <= position), coming)

    def resume(self, epoch: int, begun: Mapping[str, Any], agreed: list[Told]) -> None:
        """Goes on in an epoch at the beginning of a stretch, under what was agreed on before."""
        self.begin(epoch)
        self._number, self._end = begun["number"], begun["start"]
        self.counts = begun["counts"].numpy().copy()
        self._known = {told["number"]: told for told in agreed}

    def _draw(self, told: Told, count: int) -> bool:
        lengths = told["lengths"].numpy()
        left = np.full(len(lengths), UNLIMITED)
        if not self._repeats:
            left = np.where(lengths >= 0, np.maximum(0, lengths - self.counts), left)
        random = np.random.default_rng((self._seed, 0, self._number))
        counts = apportioned(told["shares"].numpy(), count, left=left, random=random)
        if not counts.any():
            return False
        places = np.empty(int(counts.sum()), dtype=np.int64)
        sources = random.permutation(np.repeat(np.arange(len(counts)), counts))
        for number in np.flatnonzero(counts).tolist():
            places[sources == number] = self._places(number, int(counts[number]), int(lengths[number]))
        self._begun.append({"number": self._number, "start": self._end, "counts": torch.from_numpy(self.counts.copy())})
        self._drawn.append((self._end, places))
        self.counts = self.counts + counts
        self._number += 1
        self._end += len(places)
        return True

    def _places(self, number: int, count: int, length: int) -> NDArray[np.int64]:
        """The next places of a source in the dataset: [count]."""
        indices = self.counts[number] + np.arange(count)
        if not self._dataset.is_stream(number):
            passes, within = np.divmod(indices, length)
            for turn in np.unique(passes).tolist():
                indices[passes == turn] = self._order(number, turn, length)[within[passes == turn]]
        return np.asarray(self._dataset.place_of(number, indices))

    def _order(self, number: int, turn: int, length: int) -> NDArray[np.int64]:
        """The order of a source's rows in a pass over it: [length]."""
        key = (0 if self._repeats else self._epoch, turn)
        found = self._orders.get(number)
        if found is None or found[0] != key or len(found[1]) != length:
            random = np.random.default_rng((self._seed, 1, number, *key))
            found = self._orders[number] = (key, random.permutation(length))
        return found[1]
