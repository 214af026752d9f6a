"""What a policy keeps beside its tables."""

import json
from dataclasses import dataclass

from equipoise_server.engine.progress import Progress
from equipoise_server.engine.trainers import Trainers
from equipoise_server.rules import Guard, Scalars, TableState


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What belongs to no page of a policy, as of one version.

    Attributes:
        progress: version, losses, evidence.
        trainers: deduplication table, as JSON.
        scalars: of the last step.
        guard: what g follows from.
    """

    progress: Progress
    trainers: str
    scalars: Scalars
    guard: Guard

    @property
    def version(self) -> int:
        """The version it is of."""
        return self.progress.version

    def put_into(self, state: TableState, trainers: Trainers) -> None:
        """Gives it back to a state and a deduplication table."""
        state.scalars = dict(self.scalars)
        state.guard, state.guard_strength = self.guard, self.guard.strength
        trainers.load_json(self.trainers)

    def to_fields(self) -> dict[str, bytes]:
        """As stored."""
        return {
            "progress": self.progress.to_json().encode(),
            "trainers": self.trainers.encode(),
            "scalars": json.dumps(self.scalars).encode(),
            "guard": json.dumps(self.guard.to_scalars()).encode(),
        }

    @classmethod
    def from_fields(cls, fields: dict[str, bytes]) -> "Header":
        """As it was stored; a policy that was never swept has none."""
        return cls(
            progress=Progress.from_json(fields.get("progress", b"{}")),
            trainers=fields.get("trainers", b"{}").decode(),
            scalars=json.loads(fields.get("scalars", b"{}")),
            guard=Guard.from_scalars(json.loads(fields["guard"])) if "guard" in fields else Guard(),
        )
