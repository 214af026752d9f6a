"""What a step gives back."""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from equipoise.v1 import policy_pb2 as pb


class Source(StrEnum):
    """Where weights come from."""

    SERVED = "served"
    """The server answered."""
    STALE = "stale"
    """The server did not answer: the newest weights it served before, 1 for examples it never served."""
    UNIFORM = "uniform"
    """The server did not answer and nothing recent is known: all 1."""


class Outcome(StrEnum):
    """What happened to a step."""

    APPLIED = "applied"
    """The policy moved."""
    DUPLICATE = "duplicate"
    """The step had been applied before; the weights are those of now."""
    READ = "read"
    """A read: no effect."""
    PENDING = "pending"
    """Not answered in time; kept, and sent again until it is."""
    DROPPED = "dropped"
    """Not answered in time and not kept: the window is full, or it was a read."""


OUTCOMES = {
    pb.OUTCOME_APPLIED: Outcome.APPLIED,
    pb.OUTCOME_DUPLICATE: Outcome.DUPLICATE,
    pb.OUTCOME_READ: Outcome.READ,
}
"""Outcomes of the contract that are not errors."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepResult:
    """Weights, and how they came about.

    Attributes:
        weights: float32, one per row (or per id of `weights_for`), mean 1 over all examples of the policy.
        source: where they come from.
        outcome: what happened to the step.
        version: version of the policy they belong to; for weights that were not served the newest version seen.
        epoch: epoch of that version.
        durable_sequence: all steps of this trainer up to it are in the server's store.
        staleness: how many steps of this client are newer than these weights; 0 for served ones.
    """

    weights: NDArray[np.float32]
    source: Source
    outcome: Outcome
    version: int
    epoch: int
    durable_sequence: int
    staleness: int

    @classmethod
    def served(cls, answer: pb.StepResponse, weights: NDArray[np.float32]) -> "StepResult":
        """What a server answered, with its weights."""
        return cls(
            weights=weights,
            source=Source.SERVED,
            outcome=OUTCOMES[answer.outcome],
            version=answer.version,
            epoch=answer.epoch,
            durable_sequence=answer.durable_sequence,
            staleness=0,
        )
