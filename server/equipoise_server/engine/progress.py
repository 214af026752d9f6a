"""How a policy's learning goes: version, losses and the live evidence of the Learning Law."""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from equipoise_server.engine.step import Step
from equipoise_server.rules import Evidence


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Facts of a policy beside its tables; every float is finite.

    Attributes:
        version: steps applied or refused so far.
        training_step: last reported.
        target_loss: last reported, nats.
        guard_loss: last reported, nats.
        target_loss_sum: of all reported, nats.
        target_loss_count: how many were reported.
        sim: mean/std of contributions of the last scored step (paper, section 4).
        positive_share: share of positive contributions of the last scored step.
        largest_weight: largest served weight among the last scored step's rows.
    """

    version: int = 0
    training_step: int = 0
    target_loss: float | None = None
    guard_loss: float | None = None
    target_loss_sum: float = 0.0
    target_loss_count: int = 0
    sim: float | None = None
    positive_share: float | None = None
    largest_weight: float | None = None

    def after(self, step: Step, evidence: Evidence | None) -> "Progress":
        """The progress after a step that was applied."""
        changes: dict[str, Any] = {"version": self.version + 1, "training_step": step.training_step}
        if step.target_loss is not None:
            changes["target_loss"] = step.target_loss
            changes["target_loss_sum"] = self.target_loss_sum + step.target_loss
            changes["target_loss_count"] = self.target_loss_count + 1
        if step.guard_loss is not None:
            changes["guard_loss"] = step.guard_loss
        if evidence is not None:
            changes["sim"] = evidence.sim
            changes["positive_share"] = evidence.positive_share
            changes["largest_weight"] = evidence.largest_weight
        return replace(self, **changes)

    def after_refusal(self) -> "Progress":
        """The progress after a step that was refused: an empty version."""
        return replace(self, version=self.version + 1)

    def compression_ratio(self, reference_nats: float | None) -> float | None:
        """reference_nats over the mean target loss (paper, section 2.3, in nats); None without both."""
        if reference_nats is None or self.target_loss_count == 0 or self.target_loss_sum <= 0:
            return None
        return reference_nats * self.target_loss_count / self.target_loss_sum

    def to_json(self) -> str:
        """As stored; floats keep every bit."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Progress":
        """As it was stored."""
        return cls(**json.loads(text))
