"""Live evidence of the Learning Law: in an optimal process all weighted examples contribute equally."""

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from equipoise_server.rules.base import Scalars, Statistics, TableState
from equipoise_server.rules.rule import Rule


@dataclass(frozen=True, slots=True, kw_only=True)
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
    if contributions is None or (absent := np.isnan(contributions)).all():
        return Evidence(sim=None, positive_share=None, largest_weight=largest)
    counted = rule.above_floor(state, statistics.ids, trajectory_row=statistics.trajectory_row) & ~absent
    return Evidence(
        sim=_similarity(_kept(contributions, counted), _kept(weights, counted)),
        positive_share=float(np.count_nonzero(contributions > 0.0) / (len(absent) - np.count_nonzero(absent))),
        largest_weight=largest,
    )


def _kept(values: NDArray[np.float32], rows: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The values of the rows that are True: by their positions, since a mask is slow where it changes often."""
    return values.take(rows.nonzero()[0]).astype(np.float64)


def _similarity(contributions: NDArray[np.float64], weights: NDArray[np.float64]) -> float | None:
    """SIM of arXiv 2402.17759, section 4: Σγ·c / Σγ over the deviation from it, divisor count - 1."""
    if len(contributions) < 2 or contributions.min() == contributions.max():
        return None
    total = float(weights.sum())
    if total == 0.0:
        return None
    mean = float((weights * contributions).sum()) / total
    deviation = math.sqrt(float(np.square(contributions - mean).sum()) / (len(contributions) - 1))
    return mean / deviation if deviation > 0.0 else None
