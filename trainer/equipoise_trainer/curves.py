"""What is measured along a run: losses, and what the weights look like.

Shape legend: N examples, B rows of a batch, L logged steps.
"""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise_trainer.analysis import effective_examples, similarity
from equipoise_trainer.perceptron import Array

QUANTILES = (0.1, 0.5, 0.9)
"""Of the weights of flipped and of clean examples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One logged step: losses in nats, accuracy in [0, 1], at the parameters before that step."""

    step: int
    target_loss: float
    guard_loss: float
    test_loss: float
    test_accuracy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Measurements at the logged steps.

    Attributes:
        steps: [L], ascending; the last is the number of steps of the run.
        target_loss: [L], nats, on A.
        guard_loss: [L], nats, on B.
        test_loss: [L], nats.
        test_accuracy: [L], in [0, 1].
        sim: [L], mean over standard deviation of contributions under the weights before the step; NaN where undefined.
        effective_examples: [L], 1/Σγ², in [1, N].
        effective_share: [L], effective examples over N.
        flipped_weights: [L, 3], `QUANTILES` of the weights of flipped examples; NaN without any.
        clean_weights: [L, 3], the same for the others.
        flipped_share: [L], share of the total weight on flipped examples, in [0, 1].
    """

    steps: NDArray[np.int64]
    target_loss: Array
    guard_loss: Array
    test_loss: Array
    test_accuracy: Array
    sim: Array
    effective_examples: Array
    effective_share: Array
    flipped_weights: Array
    clean_weights: Array
    flipped_share: Array

    def to_json(self) -> dict[str, Any]:
        """Lists by name; what is not finite becomes None, so that any JSON reader takes it."""
        return {each.name: _plain(getattr(self, each.name)) for each in fields(self)}


@dataclass(slots=True, kw_only=True)
class CurveRecorder:
    """Collects a curve. `flipped` is bool [N]; None: the run has no weights of its own."""

    flipped: NDArray[np.bool_] | None
    _rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, measured: Measurement, weights: Array, before: Array, contributions: Array | None) -> None:
        """Adds a logged step.

        Args:
            measured: losses.
            weights: [N], in use at this step.
            before: [B], of the batch before this step: weights that answer the contributions would flatter SIM.
            contributions: [B]; None: not measured.
        """
        row: dict[str, Any] = asdict(measured)
        row["sim"] = np.nan if contributions is None else similarity(contributions, before)
        row["effective_examples"] = effective_examples(weights)
        row["effective_share"] = row["effective_examples"] / len(weights)
        flipped = np.zeros(len(weights), dtype=np.bool_) if self.flipped is None else self.flipped
        row["flipped_weights"] = _quantiles(weights[flipped])
        row["clean_weights"] = _quantiles(weights[~flipped])
        row["flipped_share"] = float(weights[flipped].sum() / weights.sum())
        self._rows.append(row)

    def curve(self) -> Curve:
        """What was collected."""
        columns = {name: np.array([row[name] for row in self._rows]) for name in self._rows[0]}
        return Curve(steps=columns.pop("step").astype(np.int64), **columns)


def _quantiles(weights: Array) -> Array:
    return np.quantile(weights, QUANTILES) if len(weights) else np.full(len(QUANTILES), np.nan)


def _plain(values: NDArray[Any]) -> Any:
    if values.ndim > 1:
        return [_plain(row) for row in values]
    if values.dtype.kind != "f":
        return values.tolist()
    # Six digits are more than any of these has.
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values.tolist()]
