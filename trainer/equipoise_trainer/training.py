"""The training loop: gradient descent in which a weigher says how much each example counts.

Shape legend: N examples of the training set, B rows of a batch, T steps, L logged steps.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from equipoise_trainer import perceptron
from equipoise_trainer.curves import Curve, CurveRecorder, Measurement
from equipoise_trainer.perceptron import Array
from equipoise_trainer.tasks import Examples, Task

Ids: TypeAlias = NDArray[np.int64] | None
"""Ids of examples; None: all N in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What a step saw, for the weigher.

    Attributes:
        step: training step, from 0.
        ids: the batch, [B]; None: all N in order.
        contributions: [B], ∇L_A·∇l_n at the parameters before the step.
        losses: [B], nats, unweighted, at the same parameters.
        target_loss: mean loss on A there, nats.
        guard_loss: mean loss on B there, nats.
        wants_all: whether the weights of all N are wanted, rather than those of the batch.
    """

    step: int
    ids: Ids
    contributions: Array
    losses: Array
    target_loss: float
    guard_loss: float
    wants_all: bool


class Weigher(Protocol):
    """Says how much each example counts in the step whose statistics it is given."""

    def weigh(self, observation: Observation) -> Array:
        """Weights of the batch, [B], or of all examples, [N]; mean 1 over all N. Before the first step all are 1."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a run goes.

    Attributes:
        learning_rate: η > 0.
        steps: T ≥ 1.
        batch_size: B; None: full batch.
        seed: of the order of mini-batches.
        gradient_norms: [T]; where given, the gradient of step t is rescaled to this norm.
    """

    learning_rate: float
    steps: int
    batch_size: int | None = None
    seed: int = 0
    gradient_norms: Array | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate: {self.learning_rate}, must be a positive number")
        if self.steps < 1:
            raise ValueError(f"steps: {self.steps}, must be at least 1")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch: {self.batch_size}, must be at least 1, or full")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A run as it ended.

    Attributes:
        parameters: θ after step T, [F, K].
        curve: measurements at the logged steps.
        gradient_norms: [T], of the weighted gradient that each step followed.
        weights: the newest weights of all N, [N].
    """

    parameters: Array
    curve: Curve
    gradient_norms: Array
    weights: Array


def train(
    task: Task,
    examples: Examples,
    plan: Plan,
    *,
    weigher: Weigher | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Trained:
    """Trains on `examples`; without a weigher all weights are 1.

    With a weigher, `examples` is the task's training set. Each step's statistics are known in closed form before its
    parameters move, so the weights that answer them are those of the same step. Test examples are measured at the
    logged steps and influence nothing; guard examples influence nothing but what the weigher makes of their mean loss.

    Args:
        task: what is learned, and what is measured.
        examples: what is trained on.
        plan: how.
        weigher: weighs the examples of each step.
        on_step: called after each step with the number of steps done.
    """
    parameters = perceptron.initial_parameters(task.features, task.classes)
    logged = frozenset(logged_steps(plan.steps))
    recorder = CurveRecorder(flipped=task.flipped if weigher is not None else None)
    everyone = np.ones(len(examples))  # the newest weights of all N that are known
    norms = np.zeros(plan.steps)
    for step, ids in zip(range(plan.steps), _batches(len(examples), plan), strict=False):
        batch = examples if ids is None else examples.take(ids)
        now = perceptron.forward(parameters, batch)
        before, contributions = _take(everyone, ids), None
        weights = before
        if weigher is not None:
            # A logged step needs all weights before it and after it.
            wants_all = ids is None or step in logged or step + 1 in logged
            seen = _observe(task, parameters, batch, now, step=step, ids=ids, wants_all=wants_all)
            contributions, weights = seen.contributions, weigher.weigh(seen)
            if wants_all:
                everyone, weights = weights, _take(weights, ids)
        if step in logged:
            recorder.add(_measure(task, parameters, step=step), everyone, before, contributions)
        direction = perceptron.gradient(batch, now.residuals, weights)
        norms[step] = np.linalg.norm(direction)
        if plan.gradient_norms is not None and norms[step] > 0:
            direction *= plan.gradient_norms[step] / norms[step]
            norms[step] = plan.gradient_norms[step]
        parameters = parameters - plan.learning_rate * direction
        if on_step is not None:
            on_step(step + 1)
    recorder.add(_measure(task, parameters, step=plan.steps), everyone, everyone, None)
    return Trained(parameters=parameters, curve=recorder.curve(), gradient_norms=norms, weights=everyone)


def logged_steps(steps: int) -> list[int]:
    """Steps at which a run is measured: all of the first 100, then some 200 more evenly, and the last, `steps`."""
    stride = max(1, steps // 200)
    return sorted({*range(min(100, steps)), *range(0, steps, stride), steps})


def _observe(
    task: Task,
    parameters: Array,
    batch: Examples,
    now: perceptron.Pass,
    *,
    step: int,
    ids: Ids,
    wants_all: bool,
) -> Observation:
    target = perceptron.forward(parameters, task.target)
    direction = perceptron.gradient(task.target, target.residuals)
    return Observation(
        step=step,
        ids=ids,
        contributions=perceptron.contributions(batch, now.residuals, direction),
        losses=now.losses,
        target_loss=float(target.losses.mean()),
        guard_loss=perceptron.mean_loss(parameters, task.guard),
        wants_all=wants_all,
    )


def _measure(task: Task, parameters: Array, *, step: int) -> Measurement:
    return Measurement(
        step=step,
        target_loss=perceptron.mean_loss(parameters, task.target),
        guard_loss=perceptron.mean_loss(parameters, task.guard),
        test_loss=perceptron.mean_loss(parameters, task.test),
        test_accuracy=perceptron.accuracy(parameters, task.test),
    )


def _batches(size: int, plan: Plan) -> Iterator[Ids]:
    """Batches without end: every epoch a new order, each example once; the last batch of an epoch may be smaller."""
    generator = np.random.default_rng(plan.seed)
    while True:
        if plan.batch_size is None or plan.batch_size >= size:
            yield None
            continue
        order = generator.permutation(size).astype(np.int64)
        yield from (order[start : start + plan.batch_size] for start in range(0, size, plan.batch_size))


def _take(values: Array, ids: Ids) -> Array:
    return values if ids is None else values[ids]
