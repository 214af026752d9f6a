"""Live evidence of the Learning Law: in an optimal process all weighted examples contribute equally."""

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from equipoise_server.rules.base import Scalars, Statistics, TableState
from equipoise_server.rules.rule import Rule
from equipoise_server.values import value


@value
class Evidence:
    """What one step shows.

    Attributes:
        sim: mean over standard deviation of contributions under the weights before the step; None for fewer than two
            scored examples above the floor, or when their contributions do not differ.
        positive_share: share of positive contributions among all scored examples, in [0, 1]; None where only losses
            were sent.
        largest_weight: largest of these weights among the scored examples.
    """

    sim: float | None
    positive_share: float | None
    largest_weight: float


def evidence(rule: Rule, state: TableState, statistics: Statistics, scalars: Scalars) -> Evidence | None:
    """Evidence of a step that is about to be applied to `state` with `scalars`; changes nothing.

    None for a step without scored rows: it shows nothing, and what was shown before stays. The weights are those before
    the step; for batch rules, which have none, those that the step gets.
    """
    if statistics.size == 0:
        return None
    shown = state if rule.columns else replace(state, scalars=scalars)
    weights = rule.answer(shown, statistics, statistics.ids)
    largest, contributions = float(weights.max()), statistics.contributions
    if contributions is None or not (count := np.count_nonzero(measured := ~np.isnan(contributions))):
        return Evidence(sim=None, positive_share=None, largest_weight=largest)
    above = rule.above_floor(state, statistics.ids, trajectory_row=statistics.trajectory_row)
    rows = (measured & above).nonzero()[0]  # a mask is slow where it changes often
    return Evidence(
        sim=_similarity(*(values.take(rows).astype(np.float64) for values in (contributions, weights))),
        positive_share=float(np.count_nonzero(contributions > 0.0) / count),
        largest_weight=largest,
    )


def _similarity(contributions: NDArray[np.float64], weights: NDArray[np.float64]) -> float | None:
    """SIM of arXiv 2402.17759, section 4: Σγ·c / Σγ over the deviation from it, divisor count - 1."""
    if len(contributions) < 2 or (contributions == contributions[0]).all():
        return None
    total = float(weights.sum())
    if total == 0.0:
        return None
    mean = float((weights * contributions).sum()) / total
    deviation = math.sqrt(float(np.square(contributions - mean).sum()) / (len(contributions) - 1))
    return mean / deviation if deviation > 0.0 else None
