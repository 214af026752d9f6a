"""Deduplication: the last applied sequence of each trainer of a policy."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from equipoise_server.errors import sequence_gap, too_many_trainers

MAX_REFUSED = 256
"""Refused steps that are remembered of a trainer: more than it sends again at once, unless most of them are wrong."""


@dataclass(slots=True)
class Trainer:
    """What is known of a trainer.

    Attributes:
        last_sequence: of its last step that was applied or refused.
        seen_at: when that was, seconds since 1970 by the server's clock.
        refused: reasons of the newest steps that were refused, by sequence.
    """

    last_sequence: int = 0
    seen_at: float = 0.0
    refused: dict[int, str] = field(default_factory=dict)


@dataclass(slots=True)
class Trainers:
    """The trainers of one policy by their id."""

    idle_s: float
    """A trainer that is idle for longer is forgotten; its id starts at 1 again."""
    max_known: int
    """Most trainers that are known at once."""
    known: dict[str, Trainer] = field(default_factory=dict)
    _slept_from: float = 0.0
    _slept_s: float = 0.0

    def last_sequence(self, trainer_id: str) -> int:
        """Last applied sequence; 0 for an unknown trainer."""
        trainer = self.known.get(trainer_id)
        return trainer.last_sequence if trainer else 0

    def is_duplicate(self, trainer_id: str, sequence: int) -> bool:
        """Whether the step was applied before.

        Raises ServiceError: SEQUENCE_GAP when steps before it are missing, TOO_MANY_TRAINERS for one too many.
        """
        self.check_room(trainer_id)
        last = self.last_sequence(trainer_id)
        if sequence > last + 1:
            raise sequence_gap(sequence, last + 1)
        return sequence <= last

    def check_room(self, trainer_id: str) -> None:
        """Raises ServiceError (TOO_MANY_TRAINERS) for a new trainer where there is room for no more."""
        if trainer_id not in self.known and len(self.known) >= self.max_known:
            raise too_many_trainers(len(self.known), self.idle_s)

    def refusal(self, trainer_id: str, sequence: int) -> str | None:
        """Why an earlier step was refused; None: it was not, or that was long ago."""
        trainer = self.known.get(trainer_id)
        return trainer.refused.get(sequence) if trainer else None

    def record(self, trainer_id: str, sequence: int, now: float, *, refused: str | None = None) -> None:
        """Notes that the step was applied at `now`, or consumed because it was `refused` for a reason."""
        trainer = self.known.get(trainer_id)
        if trainer is None:
            trainer = self.known[trainer_id] = Trainer()
        trainer.last_sequence, trainer.seen_at = sequence, now
        if refused is not None:
            trainer.refused[sequence] = refused
            while len(trainer.refused) > MAX_REFUSED:
                del trainer.refused[next(iter(trainer.refused))]

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
        """As stored: last sequence, when seen, and the refused steps where there are any."""
        return json.dumps(
            {
                key: [trainer.last_sequence, trainer.seen_at, *([trainer.refused] if trainer.refused else [])]
                for key, trainer in self.known.items()
            }
        )

    def load_json(self, text: str | bytes) -> None:
        """Replaces the known trainers by stored ones."""
        self.known = {key: _trainer(*values) for key, values in json.loads(text).items()}

    def _idle_for(self, trainer: Trainer, now: float) -> float:
        slept_s = self._slept_s if trainer.seen_at <= self._slept_from else 0.0
        return now - trainer.seen_at - slept_s


def _trainer(last_sequence: int, seen_at: float, refused: Mapping[str, str] | None = None) -> Trainer:
    return Trainer(last_sequence, seen_at, {int(sequence): reason for sequence, reason in (refused or {}).items()})
