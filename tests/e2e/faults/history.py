"""What trainers sent and what they were answered: kept by the test, out of reach of everything that is killed."""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from equipoise import Outcome, StepResult
from equipoise_server.rules import Statistics, aggregate


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """A step that a trainer made.

    Attributes:
        ids: int64 [rows], may repeat.
        contributions: float32 [rows]; None: not sent, which some rules refuse.
        losses: float32 [rows], nats.
    """

    ids: NDArray[np.int64]
    contributions: NDArray[np.float32] | None
    losses: NDArray[np.float32]

    @property
    def statistics(self) -> Statistics:
        """What the rule gets of it."""
        return aggregate(self.ids, self.contributions, self.losses, None)

    @property
    def fields(self) -> dict[str, NDArray[np.float32]]:
        """What the client is given beside the ids."""
        given = {"contributions": self.contributions, "losses": self.losses}
        return {name: values for name, values in given.items() if values is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """What the server answered to a step or, with sequence 0, to a read.

    Attributes:
        sequence: of the step.
        outcome: what happened; None: it was refused.
        epoch: of the policy.
        version: the weights are those right after it.
        durable_sequence: what the server promised to keep.
        ids: int64, of the weights.
        weights: float32.
    """

    sequence: int
    outcome: Outcome | None
    epoch: int = 0
    version: int = 0
    durable_sequence: int = 0
    ids: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    weights: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))

    @classmethod
    def of(cls, result: StepResult, *, sequence: int, ids: NDArray[np.int64]) -> "Answered":
        """The answer that a client gave its caller."""
        return cls(
            sequence=sequence,
            outcome=result.outcome,
            epoch=result.epoch,
            version=result.version,
            durable_sequence=result.durable_sequence,
            ids=ids,
            weights=result.weights,
        )


@dataclass
class History:
    """Of one run, by trainer; each trainer writes to its own lists alone.

    Attributes:
        sent: steps in the order in which they were made; sequence s is at s - 1.
        answered: answers in the order in which they came.
        durable: the last sequence of which the server said at the end that all up to it are kept.
    """

    sent: dict[str, list[Sent]] = field(default_factory=lambda: defaultdict(list))
    answered: dict[str, list[Answered]] = field(default_factory=lambda: defaultdict(list))
    durable: dict[str, int] = field(default_factory=dict)

    @property
    def answers(self) -> int:
        """How many answers of the server there are."""
        return sum(map(len, self.answered.values()))
