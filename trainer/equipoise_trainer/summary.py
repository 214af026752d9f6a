"""What an experiment shows: one row per method, and the comparisons between them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from equipoise_trainer.analysis import first_reaching
from equipoise_trainer.experiment import Run
from equipoise_trainer.methods import METHODS, Method


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Mean and standard deviation (divisor n - 1; 0 for one seed) over seeds."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of one value per seed."""
        finite = bool(np.isfinite(values).all())
        deviation = (float(np.std(values, ddof=1)) if finite else math.nan) if len(values) > 1 else 0.0
        return cls(mean=float(np.mean(values)), deviation=deviation)

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec}} ± {self.deviation:{spec}}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodSummary:
    """One method over all seeds. "Chosen" is the step with the lowest guard loss.

    Attributes:
        method: which.
        test_loss: at the chosen step, nats.
        test_accuracy: at the chosen step, in [0, 1].
        guard_loss: at the chosen step, nats.
        final_test_loss: after the last step, nats.
        chosen_steps: the chosen step of each seed.
        learning_rates: η of each seed.
        served_wins: seeds in which the served policy's test loss is lower than this method's; None: nothing to compare.
        seconds: wall-clock time of one run.
    """

    method: Method
    test_loss: Spread
    test_accuracy: Spread
    guard_loss: Spread
    final_test_loss: Spread
    chosen_steps: tuple[int, ...]
    learning_rates: tuple[float, ...]
    served_wins: int | None
    seconds: Spread


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedSummary:
    """What is said of the served policy alone, one value per seed.

    Attributes:
        auroc: of finding flipped examples by a low score; None: no flips.
        flipped_share: share of the total weight on flipped examples at the end, in [0, 1].
        effective_share: effective examples over N at the end, in [0, 1].
        uniform_best_step: logged step of uniform's lowest test loss; None: uniform was not run.
        reached_at: first logged step at which the served policy's test loss is as low; None: never.
        accelerations: the former over the latter; None where it was never reached.
    """

    auroc: tuple[float | None, ...]
    flipped_share: tuple[float, ...]
    effective_share: tuple[float, ...]
    uniform_best_step: tuple[int, ...] | None
    reached_at: tuple[int | None, ...] | None
    accelerations: tuple[float | None, ...] | None


def summarise(runs: Sequence[Run]) -> list[MethodSummary]:
    """One row per method, in the order of the table; runs of one method are in the order of their seeds."""
    return [_row(method, rows, of(runs, "served")) for method in METHODS if (rows := of(runs, method))]


def summarise_served(runs: Sequence[Run]) -> ServedSummary | None:
    """About the served policy; None: it was not run."""
    served = of(runs, "served")
    if not served:
        return None
    uniform = of(runs, "uniform")
    bests: list[int] = []
    reached: list[int | None] = []
    for ours, theirs in zip(served, uniform, strict=False):
        index = int(np.nanargmin(theirs.trained.curve.test_loss))
        bests.append(int(theirs.trained.curve.steps[index]))
        level = float(theirs.trained.curve.test_loss[index])
        reached.append(first_reaching(ours.trained.curve.steps, ours.trained.curve.test_loss, level))
    return ServedSummary(
        auroc=tuple(run.auroc for run in served),
        flipped_share=tuple(float(run.trained.curve.flipped_share[-1]) for run in served),
        effective_share=tuple(float(run.trained.curve.effective_share[-1]) for run in served),
        uniform_best_step=tuple(bests) if uniform else None,
        reached_at=tuple(reached) if uniform else None,
        accelerations=tuple(None if r is None else b / max(r, 1) for b, r in zip(bests, reached, strict=True))
        if uniform
        else None,
    )


def of(runs: Sequence[Run], method: Method) -> list[Run]:
    """The runs of a method, by seed."""
    return sorted((run for run in runs if run.method == method), key=lambda run: run.seed)


def _row(method: Method, runs: list[Run], served: list[Run]) -> MethodSummary:
    at = [(run.trained.curve, run.chosen) for run in runs]
    losses = [float(curve.test_loss[index]) for curve, index in at]
    wins: int | None = None
    if served and method != "served":
        theirs = [float(run.trained.curve.test_loss[run.chosen]) for run in served]
        wins = sum(own < loss for own, loss in zip(theirs, losses, strict=True))
    return MethodSummary(
        method=method,
        test_loss=Spread.of(losses),
        test_accuracy=Spread.of([float(curve.test_accuracy[index]) for curve, index in at]),
        guard_loss=Spread.of([run.guard_loss for run in runs]),
        final_test_loss=Spread.of([float(curve.test_loss[-1]) for curve, _ in at]),
        chosen_steps=tuple(int(curve.steps[index]) for curve, index in at),
        learning_rates=tuple(run.candidate.learning_rate for run in runs),
        served_wins=wins,
        seconds=Spread.of([run.seconds for run in runs]),
    )
