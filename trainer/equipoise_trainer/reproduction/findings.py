"""Numbers from finished runs, as the paper defines them; compared over seeds.

An acceleration is T over the first step at which a run's loss is at most what the uniform policy's is at step T: the
paper's "at the end of training". None: never reached.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from equipoise_trainer.analysis import detection_auroc, first_reaching
from equipoise_trainer.offline.measures import BINS, Measures
from equipoise_trainer.offline.problem import Split
from equipoise_trainer.perceptron import Array
from equipoise_trainer.reproduction.runs import Curves, FinishedRun

LOW = 0.2
"""A weight below this share of its row's largest counts as low (the paper's section 4.5)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Cost of a step per example, in passes forwards (for the perceptron: products with the features).

    Attributes:
        plain: forwards and backwards.
        contributions: what ∇L_A·∇l_n takes beside.
        pull: a step of the backward pass of a search.
    """

    plain: float
    contributions: float
    pull: float


PERCEPTRON = StepCost(plain=2, contributions=1, pull=3)
TRANSFORMER = StepCost(plain=3, contributions=1, pull=13)
"""Contributions as `equipoise.torch` computes them, one more product per layer; `pull`, differentiating twice, was
measured to take 4.3 times a plain step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """One run in numbers.

    Attributes:
        seed: which.
        accelerations: of the final policy, on target and on test.
        matched: of uniform with the same gradient norms.
        online: of the online policy.
        areas: mean loss over θ_1 … θ_T on target and test, nats, uniform policy.
        final_areas: the same of the final policy.
        ends: loss at θ_T on target and test, nats, uniform policy.
        final_ends: the same of the final policy.
        matched_ends: the same of uniform with the same gradient norms.
        compression: ln|V| / area on target, uniform and final: base-free.
        area_rises: measured policy epochs whose area on target is above that of the one before.
        largest_rise: largest of these rises, share of the area before; 0: none.
        sim: mean over steps of SIM_t, uniform and final.
        adjoint_sim: the same with the adjoint.
        spearman: rank correlation of SIM and the compression ratio over policy epochs.
        effective_share: effective examples over N under the final policy, mean and least over steps.
        zero_nonpositive: share of zero weights among examples with CT ≤ 0, final policy, mean over steps.
        zero_positive: the same among those with CT > 0.
        zero_flipped: share of zero weights among flipped examples; NaN without any.
        zero_clean: the same among the others.
        auroc: of finding flipped examples by a low mean weight; NaN without any.
        learned_low: share of weights below 0.2 times the largest of the row, among examples learned perfectly.
        unlearned_low: the same among the others.
        easy_weight: mean weight of planted easy examples over that of plain ones, second half of the steps.
        group_weight: summed weight of 8 equal examples over the weight of a plain one.
        group_zero: share of zero weights among duplicates with CT > 0.
    """

    seed: int
    accelerations: tuple[float | None, float | None]
    matched: tuple[float | None, float | None]
    online: tuple[float | None, float | None] | None
    areas: tuple[float, float]
    final_areas: tuple[float, float]
    ends: tuple[float, float]
    final_ends: tuple[float, float]
    matched_ends: tuple[float, float]
    compression: tuple[float, float]
    area_rises: int
    largest_rise: float
    sim: tuple[float, float]
    adjoint_sim: tuple[float, float]
    spearman: float
    effective_share: tuple[float, float]
    zero_nonpositive: float
    zero_positive: float
    zero_flipped: float
    zero_clean: float
    auroc: float
    learned_low: float
    unlearned_low: float
    easy_weight: float
    group_weight: float
    group_zero: float

    @property
    def sim_ratio(self) -> float:
        """SIM of the final policy over that of the uniform one."""
        return self.sim[1] / self.sim[0]


def find(run: FinishedRun, *, reference_nats: float) -> Findings:
    """A run in numbers."""
    first, final = run.uniform, run.final
    size = len(final.mean_weight)
    effective = final.effective / size
    rises = [b.area / a.area - 1 for a, b in zip(run.measures, run.measures[1:], strict=False)]
    late = slice(len(final.looked) // 2, None)
    plain = float(final.plain_weight[late].mean())
    return Findings(
        seed=run.seed,
        accelerations=(acceleration(first, final, "target"), acceleration(first, final, "test")),
        matched=_accelerations_of(first, run.matched),
        online=None if run.online is None else _accelerations_of(first, run.online),
        areas=(first.area, mean_after_start(first.test_loss)),
        final_areas=(final.area, mean_after_start(final.test_loss)),
        ends=(float(first.target_loss[-1]), float(first.test_loss[-1])),
        final_ends=(float(final.target_loss[-1]), float(final.test_loss[-1])),
        matched_ends=(float(run.matched.target_loss[-1]), float(run.matched.test_loss[-1])),
        compression=(reference_nats / first.area, reference_nats / final.area),
        area_rises=sum(rise > 0 for rise in rises),
        largest_rise=max(0.0, *rises),
        sim=(float(np.nanmean(first.sim)), float(np.nanmean(final.sim))),
        adjoint_sim=(float(np.nanmean(first.adjoint_sim)), float(np.nanmean(final.adjoint_sim))),
        spearman=spearman(sims(run), compressions(run, reference_nats=reference_nats)),
        effective_share=(float(effective.mean()), float(effective.min())),
        zero_nonpositive=_mean(final.zero_nonpositive),
        zero_positive=_mean(final.zero_positive),
        zero_flipped=_mean(final.zero_flipped),
        zero_clean=_mean(final.zero_clean),
        auroc=detection_auroc(final.mean_weight, run.planted.flipped),
        learned_low=low_share(final.learned),
        unlearned_low=low_share(final.unlearned),
        easy_weight=_mean(final.easy_weight[late]) / plain,
        group_weight=_mean(final.group_weight) / float(final.plain_weight.mean()),
        group_zero=_mean(final.group_zero),
    )


def acceleration(uniform: Measures, policy: Measures, split: Split) -> float | None:
    """Of a policy over the uniform one on a split."""
    level, losses = (_losses(each, split) for each in (uniform, policy))
    return _acceleration(np.arange(len(losses), dtype=np.float64), losses, float(level[-1]))


def acceleration_of(uniform: Measures, curves: Curves, split: Split) -> float | None:
    """Of a run that is known at some steps; the first of them at which it is as low."""
    losses = curves.target_loss if split == "target" else curves.test_loss
    return _acceleration(curves.steps, losses, float(_losses(uniform, split)[-1]))


def sims(run: FinishedRun) -> Array:
    """SIM of each measured policy epoch."""
    return np.array([np.nanmean(each.sim) for each in run.measures])


def compressions(run: FinishedRun, *, reference_nats: float) -> Array:
    """Compression ratio on target of each measured policy epoch, ln|V| / nats."""
    return np.array([reference_nats / each.area for each in run.measures])


def spearman(one: Array, other: Array) -> float:
    """Rank correlation of values without ties, in [-1, 1]."""
    ranks = [np.argsort(np.argsort(each)).astype(np.float64) for each in (one, other)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def mean_after_start(losses: Array) -> float:
    """Mean over θ_1 … θ_T of losses at θ_0 … θ_T."""
    return float(losses[1:].mean())


def low_share(histogram: Array) -> float:
    """Share of weights below `LOW` of their row's largest; NaN for none."""
    total = float(histogram.sum())
    return float(histogram[: round(LOW * BINS)].sum()) / total if total else float("nan")


def online_cost(run: FinishedRun) -> float:
    """Cost of a step of the online run over that of a plain one, see `StepCost`."""
    cost, target = _cost(run)
    return (cost.plain + cost.contributions + cost.plain * target) / cost.plain


def search_cost(run: FinishedRun) -> float:
    """Cost of the whole search in plain runs, see `StepCost`; measures and the last, plain run are left out."""
    cost, target = _cost(run)
    return run.final.epoch * (cost.plain + cost.pull + cost.plain * target) / cost.plain


def _cost(run: FinishedRun) -> tuple[StepCost, float]:
    """What a step costs, and target examples per training example."""
    cost = TRANSFORMER if "vocabulary" in run.study else PERCEPTRON
    return cost, int(run.study["target_size"]) / len(run.final.mean_weight)


def median(values: Sequence[float | None]) -> float | None:
    """Median over seeds; a run that never got there counts as the slowest. None: half of them never did."""
    ordered = sorted((0.0 if value is None else value) for value in values)
    middle = float(np.median(ordered))
    return middle if ordered[(len(ordered) - 1) // 2] > 0 else None


def _losses(measures: Measures, split: Split) -> Array:
    return measures.target_loss if split == "target" else measures.test_loss


def _acceleration(steps: Array, losses: Array, level: float) -> float | None:
    reached = first_reaching(steps.astype(np.int64), losses, level)
    return None if reached is None else float(steps[-1]) / max(reached, 1)


def _accelerations_of(uniform: Measures, curves: Curves) -> tuple[float | None, float | None]:
    return acceleration_of(uniform, curves, "target"), acceleration_of(uniform, curves, "test")


def _mean(values: Array) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")
