"""What is kept of a run: its curve and its outcome, as JSON.

Shape legend: L logged steps, T steps.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from equipoise_trainer.analysis import chosen_index


@dataclass(slots=True, kw_only=True)
class Curve:
    """Measurements at the logged steps, lists of L; losses in nats at the parameters before that step.

    Attributes:
        step: ascending.
        units: compute units spent before the step.
        guard_loss: on B.
        test_loss: on the test set.
        shares: weight on each of `recipes.SOURCES` since the logged step before, in [0, 1]; None: no training sequence.
    """

    step: list[int] = field(default_factory=list)
    units: list[float] = field(default_factory=list)
    guard_loss: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    shares: list[list[float] | None] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """A finished run.

    Attributes:
        method: name of its method.
        seed: which.
        learning_rate: of AdamW.
        curve: what was measured.
        moves: [T], norms of the moves of the parameters.
        counts: sequences computed, by kind: see `Meter`.
        seconds: wall-clock time, measuring and waiting for the server included.
        auroc: of finding noisy sequences by a low score; None: no scores, or no noise.
        table_shares: share of the policy's final weight on each source; None: no table.
        facts: the policy at the end; None: no policy.
    """

    method: str
    seed: int
    learning_rate: float
    curve: Curve
    moves: list[float]
    counts: Mapping[str, int]
    seconds: float
    auroc: float | None = None
    table_shares: list[float] | None = None
    facts: Mapping[str, Any] | None = None

    @property
    def chosen(self) -> int:
        """Index of the logged step at which the run is read off: the lowest loss on B."""
        return chosen_index(np.array(self.curve.guard_loss))

    @property
    def guard_loss(self) -> float:
        """Lowest loss on B, nats; infinite when the run diverged from the start."""
        value = self.curve.guard_loss[self.chosen]
        return value if math.isfinite(value) else math.inf

    @property
    def test_loss(self) -> float:
        """Where the run is read off, nats."""
        return self.curve.test_loss[self.chosen]

    def units_to(self, level: float) -> float | None:
        """Compute units until the test loss was at most `level`, linear between logged steps; None: never."""
        losses, units = self.curve.test_loss, self.curve.units
        for index, loss in enumerate(losses):
            if loss <= level:
                if index == 0 or losses[index - 1] == loss:
                    return units[index]
                share = (losses[index - 1] - level) / (losses[index - 1] - loss)
                return units[index - 1] + share * (units[index] - units[index - 1])
        return None

    def save(self, path: Path) -> None:
        """Writes the record; a reader sees all of it or nothing."""
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self), ensure_ascii=False), encoding="utf-8")
        os.replace(part, path)

    @classmethod
    def load(cls, path: Path) -> "RunRecord":
        """Reads what `save` wrote."""
        document = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**document, "curve": Curve(**document["curve"])})
