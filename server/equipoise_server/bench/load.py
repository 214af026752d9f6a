"""What is sent: a case, and its steps, made up once and sent again and again."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from equipoise.v1 import policy_pb2 as pb

SettingValue: TypeAlias = float | bool

MAX_KEPT_BYTES = 8 << 20
MAX_KEPT_STEPS = 64
"""Of the steps that are made up: each trainer begins at another one."""

ATTEMPTS = 8
"""At each example, for rules that read outcomes."""

NEEDED: Mapping[str, tuple[str, ...]] = {
    "excess_loss": ("losses", "reference_losses"),
    "exp3": ("losses",),
    "group_dro": ("losses",),
    "group_softmax": ("losses",),
    "learnability": ("successes", "attempts"),
    "loss_linear_upper": ("losses",),
    "rho": ("losses", "reference_losses"),
    "strata": ("contributions", "losses"),
}
"""Statistics that a rule reads, where it is not `contributions` alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is compared.

    Attributes:
        rows: B, rows of a step; their ids are distinct.
        trainers: streams at once.
        pipelined: whether a trainer sends on without waiting for answers; else it has one step in flight.
        num_examples: N.
        rule: name of the rule.
        settings: of the rule.
    """

    rows: int
    trainers: int
    pipelined: bool
    num_examples: int
    rule: str
    settings: Mapping[str, SettingValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a step: their ids, int64 [B], and statistics by name, little-endian float32 or uint32 [B]."""

    ids: NDArray[np.int64]
    statistics: Mapping[str, NDArray[np.generic]]

    def request(self, sequence: int) -> pb.ExchangeRequest:
        """A step as it goes out."""
        arrays = {name: values.tobytes() for name, values in self.statistics.items()}
        step = pb.StepRequest(sequence=sequence, example_ids=self.ids.astype("<u8").tobytes(), **arrays)  # type: ignore[arg-type]
        return pb.ExchangeRequest(step=step)


def make_rows(case: Case) -> list[Rows]:
    """Random rows: ids from [0, N), statistics from a normal distribution, successes of 8 attempts."""
    random = np.random.default_rng(case.rows)
    names = NEEDED.get(case.rule, ("contributions",))
    count = max(4, min(MAX_KEPT_STEPS, MAX_KEPT_BYTES // (16 * case.rows)))
    return [
        Rows(
            random.choice(case.num_examples, case.rows, replace=False, shuffle=False).astype(np.int64),
            {name: _values(name, case.rows, random) for name in names},
        )
        for _ in range(count)
    ]


def _values(name: str, rows: int, random: np.random.Generator) -> NDArray[np.generic]:
    if name == "attempts":
        return np.full(rows, ATTEMPTS, "<u4")
    if name == "successes":
        return random.integers(0, ATTEMPTS + 1, rows).astype("<u4")
    return random.standard_normal(rows).astype("<f4")
