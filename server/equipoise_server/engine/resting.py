"""Policies that rest in the store: those that left memory because nobody used them, as they stood then."""

from dataclasses import replace

from equipoise_server.engine.status import ServiceStatus
from equipoise_server.store import Fence, Ownership, RedisStore

MAX_RESTING = 1000
"""Most policies that are remembered; of more, those that have rested longest are forgotten."""


class Resting:
    """Remembers policies until somebody brings them back, here or elsewhere, or deletes them; for one event loop.

    So that how they stand can still be shown: that nobody uses a policy does not make it vanish.
    """

    def __init__(self) -> None:
        self._policies: dict[str, tuple[Ownership, ServiceStatus]] = {}

    @property
    def statuses(self) -> list[ServiceStatus]:
        """How they stood, those that have rested longest first."""
        return [status for _, status in self._policies.values()]

    def add(self, owner: Ownership, status: ServiceStatus) -> None:
        """A policy has left memory; all of it is in the store."""
        name = status.policy.name
        self._policies.pop(name, None)
        self._policies[name] = (
            owner,
            replace(status, in_memory=False, trainers=0, queued_steps=0, queue_ratio=0.0, unpersisted=0, lag_s=0.0),
        )
        if len(self._policies) > MAX_RESTING:
            del self._policies[next(iter(self._policies))]

    def forget(self, name: str) -> None:
        """It is in memory again, or somebody else's, or deleted."""
        self._policies.pop(name, None)

    async def refresh(self, store: RedisStore) -> None:
        """Forgets those that another server has acquired since, or that were deleted. Raises StoreError."""
        asked = [(name, owner) for name, (owner, _) in self._policies.items()]
        if not asked:
            return
        fences = await store.check_fences([owner for _, owner in asked])
        for (name, owner), fence in zip(asked, fences, strict=True):
            known = self._policies.get(name)
            if fence not in (Fence.RELEASED, Fence.HELD) and known is not None and known[0] == owner:
                del self._policies[name]
