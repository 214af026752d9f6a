"""Deduplication: the last applied sequence of each trainer of a policy."""

import json
from collections.abc import Collection
from dataclasses import dataclass, field

from equipoise_server.errors import sequence_gap


@dataclass(slots=True)
class Trainer:
    """Last applied sequence of a trainer, and when (the server's clock, seconds since 1970) it was last seen."""

    last_sequence: int
    seen_at: float


@dataclass(slots=True)
class Trainers:
    """The trainers of one policy by their id."""

    idle_s: float
    """A trainer that is idle for longer is forgotten; its id starts at 1 again."""
    known: dict[str, Trainer] = field(default_factory=dict)
    _slept_from: float = 0.0
    _slept_s: float = 0.0

    def last_sequence(self, trainer_id: str) -> int:
        """Last applied sequence; 0 for an unknown trainer."""
        trainer = self.known.get(trainer_id)
        return trainer.last_sequence if trainer else 0

    def is_duplicate(self, trainer_id: str, sequence: int) -> bool:
        """Whether the step was applied before. Raises ServiceError (SEQUENCE_GAP) when steps before it are missing."""
        last = self.last_sequence(trainer_id)
        if sequence > last + 1:
            raise sequence_gap(sequence, last + 1)
        return sequence <= last

    def record(self, trainer_id: str, sequence: int, now: float) -> None:
        """Notes that the step was applied (or consumed by a refusal) at `now`."""
        self.known[trainer_id] = Trainer(sequence, now)

    def wake(self, now: float) -> None:
        """The policy was not served since a trainer was last seen: that time makes nobody idle.

        Else an outage longer than `idle_s` would end in trainers who send again what was applied before.
        """
        self._slept_from = max((trainer.seen_at for trainer in self.known.values()), default=now)
        self._slept_s = max(0.0, now - self._slept_from)

    def forget_idle(self, now: float, *, here: Collection[str] = ()) -> list[str]:
        """Forgets trainers idle for longer than `idle_s`, but for those who are `here`; who was forgotten."""
        idle = [key for key, trainer in self.known.items() if self._idle_for(trainer, now) > self.idle_s]
        forgotten = [key for key in idle if key not in here]
        for key in forgotten:
            del self.known[key]
        return forgotten

    def to_json(self) -> str:
        """As stored."""
        return json.dumps({key: [trainer.last_sequence, trainer.seen_at] for key, trainer in self.known.items()})

    def load_json(self, text: str | bytes) -> None:
        """Replaces the known trainers by stored ones."""
        self.known = {key: Trainer(*values) for key, values in json.loads(text).items()}

    def _idle_for(self, trainer: Trainer, now: float) -> float:
        slept_s = self._slept_s if trainer.seen_at <= self._slept_from else 0.0
        return now - trainer.seen_at - slept_s
