"""How a policy's learning goes: version, losses and the live evidence of the Learning Law."""

import json
from dataclasses import asdict, replace

from equipoise_server.engine.step import Step
from equipoise_server.rules import Evidence
from equipoise_server.values import value


@value
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
        target, guard, shown = step.target_loss, step.guard_loss, evidence or self
        return Progress(
            version=self.version + 1,
            training_step=step.training_step,
            target_loss=self.target_loss if target is None else target,
            guard_loss=self.guard_loss if guard is None else guard,
            target_loss_sum=self.target_loss_sum + (target or 0.0),
            target_loss_count=self.target_loss_count + (target is not None),
            sim=shown.sim,
            positive_share=shown.positive_share,
            largest_weight=shown.largest_weight,
        )

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
