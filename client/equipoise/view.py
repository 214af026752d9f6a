"""What a client knows of its policy: which one it is, how far it is, and the newest weight of each example."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from equipoise.channel import MAX_MESSAGE_BYTES
from equipoise.results import Outcome, Source, StepResult
from equipoise.v1 import policy_pb2 as pb
from equipoise.wire import Bounds


class PolicyView:
    """What a client knows of its policy.

    Args:
        num_examples: N; 0: not known yet.
        max_staleness: most steps that weights may be older than the newest step, to be used at all.
        cached_examples: examples whose newest weight is kept.
    """

    def __init__(self, *, num_examples: int, max_staleness: int, cached_examples: int) -> None:
        self.bounds = Bounds(num_examples=num_examples)
        self.uid = ""
        """Incarnation of the policy; empty: not known."""
        self.seen = (0, 0)
        """Newest (epoch, version) seen."""
        self.durable_sequence = 0
        """All steps of this trainer up to it are in the server's store."""
        self.made = 0
        """Steps made so far."""
        self._made_when_served = 0
        self._max_staleness = max_staleness
        self._cache = WeightsCache(capacity=cached_examples)
        self._cache.resize(num_examples)

    @property
    def staleness(self) -> int:
        """How many steps are newer than the newest answer."""
        return self.made - self._made_when_served

    def resize(self, num_examples: int) -> None:
        """The policy has this many examples."""
        self.bounds = replace(self.bounds, num_examples=num_examples)
        self._cache.resize(num_examples)

    def limit(self, *, max_batch_examples: int, max_message_bytes: int) -> None:
        """The server takes so many rows and bytes at once; 0: it does not say."""
        largest = min(max_message_bytes or MAX_MESSAGE_BYTES, MAX_MESSAGE_BYTES)
        self.bounds = replace(self.bounds, max_batch_examples=max_batch_examples, max_message_bytes=largest)

    def become(self, uid: str) -> None:
        """The policy is another incarnation: nothing known of the old one holds."""
        self.uid = uid
        self.seen = (0, 0)
        self.durable_sequence = 0
        self._cache.clear()

    def observe(self, epoch: int, version: int) -> bool:
        """Takes note of (epoch, version); whether it did not go back."""
        advances = (epoch, version) >= self.seen
        self.seen = (epoch, version)
        return advances

    def serve(
        self, answer: pb.StepResponse, ids: NDArray[np.uint64], weights: NDArray[np.float32], *, made: int
    ) -> None:
        """Keeps the weights of an answer to a step or read made when `made` steps were."""
        self._cache.store(ids, weights, version=answer.version)
        self._made_when_served = max(self._made_when_served, made)

    def preload(self, weights: NDArray[np.float32]) -> None:
        """Keeps the weights of the first examples where no answer has told them yet."""
        self._cache.store(np.arange(len(weights), dtype=np.uint64), weights, version=0)

    def weights(self, ids: NDArray[np.uint64]) -> tuple[NDArray[np.float32], Source]:
        """Newest weight of each id, 1 where unknown; all 1 when they are too old."""
        weights, known = self._cache.lookup(ids)
        if self.staleness <= self._max_staleness and known.any():
            return weights, Source.STALE
        return np.ones(len(ids), np.float32), Source.UNIFORM

    def knows(self, ids: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Whether the weight of each id is known."""
        return self._cache.lookup(ids)[1]

    def fallback(self, ids: NDArray[np.uint64], outcome: Outcome, *, knows: bool = True) -> StepResult:
        """An answer without the server; uniform when what is known is not what was asked for (`knows`)."""
        weights, source = self.weights(ids) if knows else (np.ones(len(ids), np.float32), Source.UNIFORM)
        epoch, version = self.seen
        return StepResult(
            weights=weights,
            source=source,
            outcome=outcome,
            version=version,
            epoch=epoch,
            durable_sequence=self.durable_sequence,
            staleness=self.staleness,
        )


class WeightsCache:
    """The newest weight of each example, and its version, in bounded memory.

    There is one slot for each example while they all fit. Beyond that, examples share slots, and a new weight takes the
    place of an older one. A strict order of use would cost a dictionary operation per row; this costs three array
    operations per answer.

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
        self._newest = 0

    def store(self, ids: NDArray[np.uint64], weights: NDArray[np.float32], *, version: int) -> None:
        """Remembers the weights [B] of ids [B], unless a newer version of the slot is known."""
        if not self._size:
            return
        slots = self._slots(ids)
        if version < self._newest:
            newer = self._versions[slots] <= version
            slots, ids, weights = slots[newer], ids[newer], weights[newer]
        self._newest = max(self._newest, version)
        self._owners[slots] = ids + np.uint64(1)
        self._weights[slots] = weights
        self._versions[slots] = version

    def lookup(self, ids: NDArray[np.uint64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Weights [B] of ids [B], 1 where unknown; and whether each is known."""
        if not self._size:
            return np.ones(len(ids), np.float32), np.zeros(len(ids), np.bool_)
        slots = self._slots(ids)
        known = self._owners[slots] == ids + np.uint64(1)
        return np.where(known, self._weights[slots], np.float32(1)), known

    def _slots(self, ids: NDArray[np.uint64]) -> NDArray[np.int64]:
        return (ids % np.uint64(self._size)).view(np.int64)  # NumPy converts any other index at each use
