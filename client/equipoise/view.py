"""What a client knows of its policy: which one it is, how far it is, and the newest weight of each example."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from equipoise.results import Outcome, Source, StepResult
from equipoise.v1 import policy_pb2 as pb
from equipoise.weights_cache import WeightsCache
from equipoise.wire import Bounds


class PolicyView:
    """See the module.

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

    def limit(self, max_batch_examples: int) -> None:
        """The server takes this many rows."""
        self.bounds = replace(self.bounds, max_batch_examples=max_batch_examples)

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
