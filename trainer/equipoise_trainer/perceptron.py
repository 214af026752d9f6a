"""The perceptron: softmax regression, for two classes logistic regression, with everything in closed form.

Shape legend: n examples, F features, C classes, K logits (1 for two classes, else C). All arrays are float64.

With residuals ρ = p − y [n, K], the gradient of example n is the outer product x_n ρ_nᵀ. No example's gradient is ever
formed: a weighted gradient is Xᵀ(w·ρ)/n, and a contribution is ∇L_A·∇l_n = ρ_n · (Vᵀx_n) with V = ∇L_A [F, K].
"""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from equipoise_trainer.tasks import Examples

Array: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """What one forward pass over n examples gives.

    Attributes:
        losses: [n], nats, unweighted.
        residuals: [n, K], ρ = ∂l/∂logits.
    """

    losses: Array
    residuals: Array


def initial_parameters(features: int, classes: int) -> Array:
    """θ = 0, [F, K]: the uniform guess. The problem is convex, so that nothing depends on the start."""
    return np.zeros((features, 1 if classes == 2 else classes))


def forward(parameters: Array, examples: Examples) -> Pass:
    """Losses and residuals of every example."""
    logits = examples.features @ parameters
    if parameters.shape[1] == 1:
        # l = log(1 + exp(−s)) with s the signed logit; computed without overflow.
        signs = 2.0 * examples.labels[:, None] - 1.0
        signed = signs * logits
        losses = np.logaddexp(0.0, -signed)
        residuals: Array = np.asarray(-signs * np.exp(-np.logaddexp(0.0, signed)), dtype=np.float64)
        return Pass(losses=losses[:, 0], residuals=residuals)
    logits = logits - logits.max(axis=1, keepdims=True)
    exponentials = np.exp(logits)
    totals = exponentials.sum(axis=1, keepdims=True)
    rows = np.arange(len(examples))
    losses = np.log(totals[:, 0]) - logits[rows, examples.labels]
    residuals = exponentials / totals
    residuals[rows, examples.labels] -= 1.0
    return Pass(losses=losses, residuals=residuals)


def gradient(examples: Examples, residuals: Array, weights: Array | None = None) -> Array:
    """∇ mean_n(w_n·l_n), [F, K]; weights [n], None: all 1."""
    weighted = residuals if weights is None else residuals * weights[:, None]
    result: Array = examples.features.T @ weighted / len(examples)
    return result


def contributions(examples: Examples, residuals: Array, direction: Array) -> Array:
    """c_n = ∇L_A · ∇l_n, [n], for the unweighted example losses; `direction` is ∇L_A [F, K]."""
    result: Array = np.einsum("nk,nk->n", residuals, examples.features @ direction)
    return result


def mean_loss(parameters: Array, examples: Examples) -> float:
    """Mean loss, nats."""
    return float(forward(parameters, examples).losses.mean())


def accuracy(parameters: Array, examples: Examples) -> float:
    """Share of examples whose most likely class is their label, in [0, 1]."""
    logits = examples.features @ parameters
    guesses = (logits[:, 0] > 0).astype(np.int64) if parameters.shape[1] == 1 else logits.argmax(axis=1)
    return float((guesses == examples.labels).mean())
