"""The fields of a step, taken out of its message once: every access to bytes in a message copies them."""

from typing import Self

from equipoise.v1 import policy_pb2 as pb
from equipoise_server.values import value

ROW_STATISTICS = ("contributions", "losses", "reference_losses")
OUTCOMES = ("successes", "attempts")
STATISTICS = (*ROW_STATISTICS, *OUTCOMES, "gradient_sketches", "target_sketch")


@value
class StepFields:
    """What a StepRequest says, field by field; None: a field with presence that is not there."""

    sequence: int = 0
    step: int = 0
    example_ids: bytes | None = None
    all_examples: bool = False
    contributions: bytes = b""
    losses: bytes = b""
    reference_losses: bytes = b""
    scored: bytes = b""
    target_loss: float | None = None
    guard_loss: float | None = None
    gradient_sketches: bytes = b""
    target_sketch: bytes = b""
    sketch_type: int = pb.SKETCH_TYPE_UNSPECIFIED
    weights_for: bytes | None = None
    omit_weights: bool = False
    groups: bytes = b""
    measured: bytes = b""
    successes: bytes = b""
    attempts: bytes = b""
    target_losses: bytes = b""
    target_groups: bytes = b""

    @classmethod
    def of(cls, message: pb.StepRequest) -> Self:
        """Those of a message."""
        return cls(**{field.name: value for field, value in message.ListFields()})

    @property
    def is_step(self) -> bool:
        """Whether it carries statistics or losses; else it is a read."""
        if self.target_loss is not None or self.guard_loss is not None:
            return True
        return any(getattr(self, name) for name in (*STATISTICS, "target_losses"))

    def answer_bytes(self, *, num_examples: int) -> int:
        """Bytes of the weights that the answer will carry, at most."""
        if self.omit_weights:
            return 0
        if self.all_examples and self.weights_for is None:
            return 4 * num_examples
        ids = self.example_ids if self.weights_for is None else self.weights_for
        return len(ids or b"") // 2
