"""A step or read as the engine takes it, and its answer."""

from enum import Enum

import numpy as np
from numpy.typing import NDArray

from equipoise_server.errors import ServiceError
from equipoise_server.rules import Statistics
from equipoise_server.values import value


class Kind(Enum):
    """What a request asks for."""

    READ = "read"
    """Weights only."""
    STEP = "step"
    """Apply statistics: one version."""
    REFUSED = "refused"
    """A step of a stream that failed validation: it consumes its sequence and a version, nothing else."""


class Outcome(Enum):
    """What became of a request; the values are the wire's numbers."""

    APPLIED = 1
    DUPLICATE = 2
    READ = 3
    REFUSED = 4


@value
class Step:
    """A validated step or read.

    Attributes:
        kind: what it asks for.
        trainer_id: who sends it; empty for a unary step without deduplication.
        sequence: the trainer's number; 0 for reads and for steps without deduplication.
        training_step: informational.
        statistics: what the rule consumes.
        target_loss: mean loss on target set A, nats.
        guard_loss: mean loss on guard set B, nats.
        wants_weights: whether the answer carries weights.
        weights_for: int64 ids whose weights are asked for; None: all N examples in order.
        error: why it is refused.
        in_stream: whether a refusal is an answer that consumes the sequence; else it is raised and consumes nothing.
        num_rows: rows of the request, for the record.
    """

    kind: Kind
    trainer_id: str = ""
    sequence: int = 0
    training_step: int = 0
    statistics: Statistics | None = None
    target_loss: float | None = None
    guard_loss: float | None = None
    wants_weights: bool = True
    weights_for: NDArray[np.int64] | None = None
    error: ServiceError | None = None
    in_stream: bool = True
    num_rows: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays, which it occupies while it waits."""
        statistics = self.statistics.nbytes if self.statistics is not None else 0
        return statistics + (self.weights_for.nbytes if self.weights_for is not None else 0)


@value
class Answer:
    """What became of a step or read.

    Attributes:
        sequence: of the request.
        version: of the policy right after it.
        outcome: what happened.
        weights: float32 served weights asked for; None: none.
        error: why it was refused.
        last_sequence: the trainer's last applied sequence after it.
    """

    sequence: int
    version: int
    outcome: Outcome
    weights: NDArray[np.float32] | None = None
    error: ServiceError | None = None
    last_sequence: int = 0
