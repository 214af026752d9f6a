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
TRAJECTORY_ROWS = 4
"""T where nothing else is said; steps are of row 0."""

CONTRIBUTIONS = ("contributions",)
SKETCHES = ("gradient_sketches", "target_sketch")
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
        rule: name of the rule.
        settings: of the rule.
        sketch: k, values of the gradient sketch that is sent for each row in place of its contribution; 0: none.
    """

    rows: int
    trainers: int
    pipelined: bool
    rule: str
    settings: Mapping[str, SettingValue] = field(default_factory=dict)
    sketch: int = 0

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of what is sent for each row."""
        return SKETCHES if self.sketch else NEEDED.get(self.rule, CONTRIBUTIONS)

    def settings_for(self, num_examples: int) -> Mapping[str, SettingValue]:
        """The settings, with what a rule cannot do without."""
        if self.rule != "trajectory":
            return self.settings
        return {"rows": TRAJECTORY_ROWS, "learning_rate": 0.1 / num_examples, **self.settings}


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a step: their ids, int64 [B], and statistics by name, little-endian float32 or uint32 [B].

    Sketches are float32 [B, k], that of the target [k].
    """

    ids: NDArray[np.int64]
    statistics: Mapping[str, NDArray[np.generic]]

    def request(self, sequence: int) -> pb.ExchangeRequest:
        """A step as it goes out."""
        arrays = {name: values.tobytes() for name, values in self.statistics.items()}
        step = pb.StepRequest(sequence=sequence, example_ids=self.ids.astype("<u8").tobytes(), **arrays)  # type: ignore[arg-type]
        return pb.ExchangeRequest(step=step)


def make_rows(case: Case, num_examples: int) -> list[Rows]:
    """Random rows: ids from [0, N), statistics from a normal distribution, successes of 8 attempts."""
    random = np.random.default_rng(case.rows)
    count = max(4, min(MAX_KEPT_STEPS, MAX_KEPT_BYTES // ((16 + 4 * case.sketch) * case.rows)))
    return [
        Rows(
            random.choice(num_examples, case.rows, replace=False, shuffle=False).astype(np.int64),
            {name: _values(name, case, random) for name in case.statistics},
        )
        for _ in range(count)
    ]


def _values(name: str, case: Case, random: np.random.Generator) -> NDArray[np.generic]:
    if name == "attempts":
        return np.full(case.rows, ATTEMPTS, "<u4")
    if name == "successes":
        return random.integers(0, ATTEMPTS + 1, case.rows).astype("<u4")
    shapes = {"gradient_sketches": (case.rows, case.sketch), "target_sketch": (case.sketch,)}
    return random.standard_normal(shapes.get(name, (case.rows,))).astype("<f4")
