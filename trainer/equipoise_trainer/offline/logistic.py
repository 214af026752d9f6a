"""The paper's perceptron as a problem of the search: logistic regression, everything in closed form.

With z̃_n = y_n·x_n (y = ±1), s_n = z̃_n·θ and ρ_n = −σ(−s_n): l_n = log(1 + e^(−s_n)), ∇l_n = ρ_n·z̃_n, and the
Hessian of l_n is σ(s_n)σ(−s_n)·z̃_n z̃_nᵀ. No example's gradient and no Hessian is ever formed.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from equipoise_trainer.offline.problem import Look, Split, Statistics
from equipoise_trainer.offline.rows import Weights
from equipoise_trainer.tasks import Examples, Task

Vector: TypeAlias = NDArray[np.floating]

STEEPEST = 80.0
"""Beyond this logit e^s overflows in float32, and the loss is 0 anyway."""


class LogisticProblem:
    """See the module.

    Args:
        task: two classes.
        learning_rate: η.
        dtype: of all arithmetic; float32 is twice as fast, since a step is bound by memory.
    """

    def __init__(self, task: Task, *, learning_rate: float, dtype: DTypeLike = np.float32) -> None:
        if task.classes != 2:
            raise ValueError(f"classes: {task.classes}, must be 2")
        self._learning_rate = learning_rate
        self._train = signed_features(task.train, dtype)
        self._target = signed_features(task.target, dtype)
        self._splits: dict[Split, Vector] = {"target": self._target, "test": signed_features(task.test, dtype)}

    @property
    def num_examples(self) -> int:
        """N."""
        return len(self._train)

    @property
    def vector_bytes(self) -> int:
        """Memory of one vector of parameters."""
        return int(self._train.itemsize * self._train.shape[1])

    @property
    def reference_nats(self) -> float:
        """ln 2."""
        return math.log(2)

    def initial(self) -> Vector:
        """θ = 0: the problem is convex, so that nothing depends on the start."""
        start: Vector = np.zeros(self._train.shape[1], dtype=self._train.dtype)
        return start

    def descend(self, parameters: Vector, weights: Weights, *, norm: float | None = None) -> tuple[Vector, float]:
        """See `Problem`."""
        gradient = (weights * residuals(self._train @ parameters)) @ self._train / self.num_examples
        length = float(np.linalg.norm(gradient))
        if norm is not None and length > 0:
            gradient *= norm / length
            length = norm
        return parameters - self._learning_rate * gradient, length

    def target_gradient(self, parameters: Vector) -> Vector:
        """See `Problem`."""
        gradient: Vector = self._target_gradients(parameters[None])[0]
        return gradient

    def replay(self, parameters: Sequence[Vector], weights: Weights) -> "LogisticSegment":
        """See `Problem`. All k steps' logits are one matrix product."""
        stacked = np.stack(parameters)
        return LogisticSegment(
            features=self._train,
            logits=stacked @ self._train.T,
            weights=weights,
            targets=self._target_gradients(stacked),
            learning_rate=self._learning_rate,
        )

    def mean_losses(self, parameters: Sequence[Vector], split: Split) -> NDArray[np.float64]:
        """See `Problem`."""
        features = self._splits[split]
        means = [softplus(-(np.stack(part) @ features.T)).mean(axis=1) for part in _parts(parameters, 64)]
        return np.concatenate(means).astype(np.float64)

    def _target_gradients(self, parameters: Vector) -> Vector:
        """∇L_A at each of [k, F], [k, F]."""
        result: Vector = residuals(parameters @ self._target.T) @ self._target / len(self._target)
        return result


class LogisticSegment:
    """k steps of the perceptron, see `equipoise_trainer.offline.problem.Segment`."""

    def __init__(
        self, *, features: Vector, logits: Vector, weights: Weights, targets: Vector, learning_rate: float
    ) -> None:
        self._features = features
        self._logits = logits
        self._residuals = residuals(logits)
        # σ(s)σ(−s) = −ρ(1 + ρ)
        self._curvatures = weights * (-self._residuals * (1 + self._residuals)) / len(features)
        self._targets = targets
        self._learning_rate = learning_rate

    def pull(self, index: int, adjoint: Vector) -> tuple[Statistics, Vector]:
        """See `Segment`."""
        along = self._features @ adjoint
        curved = (self._curvatures[index] * along) @ self._features
        return self._residuals[index] * along, self._targets[index] + adjoint - self._learning_rate * curved

    def look(self, index: int) -> Look:
        """See `Segment`."""
        along = self._features @ self._targets[index]
        return Look(losses=softplus(-self._logits[index]), contributions=self._residuals[index] * along)


def signed_features(examples: Examples, dtype: DTypeLike) -> Vector:
    """y_n·x_n, [n, F], for labels 0 and 1."""
    signed = examples.features * (2.0 * examples.labels[:, None] - 1.0)
    return np.ascontiguousarray(signed, dtype=dtype)


def residuals(logits: Vector) -> Vector:
    """ρ = −σ(−s)."""
    return np.asarray(-1 / (1 + np.exp(np.minimum(logits, STEEPEST))), dtype=logits.dtype)


def softplus(values: Vector) -> Vector:
    """log(1 + e^v) without overflow."""
    return np.asarray(np.maximum(values, 0) + np.log1p(np.exp(-np.abs(values))), dtype=values.dtype)


def _parts(values: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [values[start : start + size] for start in range(0, len(values), size)]
