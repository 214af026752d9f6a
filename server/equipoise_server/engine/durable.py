"""How far each trainer's steps are in the store."""

from collections import deque
from dataclasses import dataclass, field


@dataclass(slots=True)
class DurableSequences:
    """Per trainer: which of its applied steps are in the store."""

    durable: dict[str, int] = field(default_factory=dict)
    applied: dict[str, deque[tuple[int, int]]] = field(default_factory=dict)

    def add(self, trainer_id: str, *, version: int, sequence: int) -> None:
        """Notes that a trainer's step became a version."""
        self.applied.setdefault(trainer_id, deque()).append((version, sequence))

    def get(self, trainer_id: str, *, durable_version: int) -> int:
        """All steps of the trainer up to this sequence are in the store."""
        waiting = self.applied.get(trainer_id)
        while waiting and waiting[0][0] <= durable_version:
            self.durable[trainer_id] = waiting.popleft()[1]
        return self.durable.get(trainer_id, 0)

    def forget(self, trainer_id: str) -> None:
        """The trainer starts anew."""
        self.durable.pop(trainer_id, None)
        self.applied.pop(trainer_id, None)
