"""What a client gives back: the weights of a step, and counts over all of them."""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from equipoise.v1 import policy_pb2 as pb


class Source(StrEnum):
    """Where weights come from."""

    SERVED = "served"
    """The server answered this step with them."""
    STALE = "stale"
    """The server did not answer in time. These are the newest weights that it served before, 1 where it never did."""
    UNIFORM = "uniform"
    """The server did not answer in time, and nothing recent is known. All are 1."""


class Outcome(StrEnum):
    """What happened to a step."""

    APPLIED = "applied"
    """The server applied the step, and the policy moved."""
    DUPLICATE = "duplicate"
    """The server had applied the step before. The weights are those of now."""
    READ = "read"
    """It was a read. It has no effect."""
    PENDING = "pending"
    """There was no answer in time. The step is kept, and sent again until there is one."""
    DROPPED = "dropped"
    """There was no answer in time, and nothing was kept: the window was full, or it was a read."""


OUTCOMES = {
    pb.OUTCOME_APPLIED: Outcome.APPLIED,
    pb.OUTCOME_DUPLICATE: Outcome.DUPLICATE,
    pb.OUTCOME_READ: Outcome.READ,
}
"""Outcomes of the contract that are not errors."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepResult:
    """The weights of a step or read, and how they came about.

    Attributes:
        weights: float32 [B], one per row of the step (or per id of `weights_for`), with mean 1 over all examples of the
            policy. The array is the caller's own.
        source: where the weights come from.
        outcome: what happened to the step.
        version: the version of the policy that the weights belong to. If they were not served for this step, the newest
            version seen.
        epoch: the epoch of that version; it grows each time a server takes the policy over.
        durable_sequence: all steps of this trainer up to this number are in the server's store.
        staleness: how many steps of this client are newer than these weights; 0 if they were served.
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


@dataclass(slots=True, kw_only=True)
class Stats:
    """What a client has counted since it was made.

    Attributes:
        steps: steps made by `step` and `submit`.
        applied: steps that the server applied.
        duplicates: steps that the server had applied before.
        refused: steps that the server refused.
        fallbacks: steps and reads answered without the server, from older weights or uniformly.
        reconnects: streams opened after the first.
        outages: times the server was lost, or did not answer in time.
        dropped: steps whose statistics were dropped because the window was full.
        forgotten: answered steps that were let go before they were durable because the window was full.
        lost: steps that the server had acknowledged and has lost.
        regressions: times the policy's (epoch, version) went back.
        unacked: steps that wait for their answer now.
        undurable: steps that are kept for replay now.
        staleness: steps made since the newest answer now.
        connected: whether there is an open stream to a server that answers now.
        longest_stall: longest wait of a step or read, seconds.
    """

    steps: int = 0
    applied: int = 0
    duplicates: int = 0
    refused: int = 0
    fallbacks: int = 0
    reconnects: int = 0
    outages: int = 0
    dropped: int = 0
    forgotten: int = 0
    lost: int = 0
    regressions: int = 0
    unacked: int = 0
    undurable: int = 0
    staleness: int = 0
    connected: bool = False
    longest_stall: float = 0.0
