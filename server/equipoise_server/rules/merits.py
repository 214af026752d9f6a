"""What the contributions of a stratum say about it: mean over standard error, and the weight that follows."""

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from equipoise_server.rules.exponential import exponential
from equipoise_server.rules.weights import ONE

_LEAST_VARIANCE = 1e-9
"""Of contributions in units of their running RMS: equal ones have an error, too."""

_LARGEST_EXPONENT = 30.0
"""A logistic function beyond it is 0 or 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """How contributions decide.

    Attributes:
        min_count: a stratum with fewer contributions keeps its weight.
        lower_below: z below which a stratum gets the floor.
        raise_above: z above which it gets full weight again.
        soft: weights rise smoothly with z instead, half-way at the middle of these two.
        floor: smallest weight, a multiple of 2^-30.
    """

    min_count: float
    lower_below: float
    raise_above: float
    soft: bool
    floor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Merits:
    """Contributions of each stratum, older ones fading, and the weights that they led to. S strata of all groups.

    Attributes:
        count: float64 [S], how many contributions.
        total: float64 [S], their sum, in units of the running RMS.
        square: float64 [S], the sum of their squares.
        weight: float64 [S], in [floor, 1].
    """

    count: NDArray[np.float64]
    total: NDArray[np.float64]
    square: NDArray[np.float64]
    weight: NDArray[np.float64]

    @classmethod
    def none(cls, strata: int) -> "Merits":
        """No contributions: all weights are 1."""
        return cls(count=np.zeros(strata), total=np.zeros(strata), square=np.zeros(strata), weight=np.ones(strata))

    def after(
        self, contributions: NDArray[np.float64], strata: NDArray[np.int64], *, memory: float, decision: Decision
    ) -> "Merits":
        """With contributions [B] to strata [B] in it: a stratum remembers about `memory` of its own."""
        size = len(self.count)
        new = np.bincount(strata, minlength=size).astype(np.float64)
        kept = memory / (memory + new)
        seen = replace(
            self,
            count=self.count * kept + new,
            total=self.total * kept + np.bincount(strata, weights=contributions, minlength=size),
            square=self.square * kept + np.bincount(strata, weights=contributions * contributions, minlength=size),
        )
        return replace(seen, weight=seen._weights(decision))

    @property
    def means(self) -> NDArray[np.float64]:
        """Mean contribution [S], 0 where there is none."""
        return self.total / np.maximum(self.count, 1.0)

    @property
    def errors(self) -> NDArray[np.float64]:
        """Standard error of the mean [S]; infinite where there is none."""
        with np.errstate(divide="ignore"):
            variance = np.maximum(self.square / np.maximum(self.count, 1.0) - self.means**2, _LEAST_VARIANCE)
            return np.sqrt(variance / self.count)

    def contrast(self, min_count: float) -> float | None:
        """F: how much more the means differ than their errors explain, among strata with enough contributions.

        About 1 where chance explains it all; None for fewer than two such strata.
        """
        told = self.count >= max(min_count, 1.0)
        if told.sum() < 2:
            return None
        means, precision = self.means[told], 1.0 / np.square(self.errors[told])  # pow differs between processors
        middle = float((precision * means).sum()) / float(precision.sum())
        return float((precision * np.square(means - middle)).sum()) / (len(means) - 1)

    def z(self, min_count: float) -> NDArray[np.float64]:
        """Mean over error [S], times √(1 - 1/F): nearer to 0 where chance explains how strata differ.

        Of means that spread about 0 this is the posterior mean over its deviation (empirical Bayes). 0 where a stratum
        has too few contributions.
        """
        contrast = self.contrast(min_count)
        if contrast is None or contrast <= 1.0:
            return np.zeros(len(self.count))
        told = self.count >= max(min_count, 1.0)
        return np.where(told, math.sqrt(1.0 - 1.0 / contrast) * self.means / self.errors, 0.0)

    def _weights(self, decision: Decision) -> NDArray[np.float64]:
        told = self.count >= max(decision.min_count, 1.0)
        z = self.z(decision.min_count)
        if decision.soft:
            middle, width = (
                0.5 * (decision.lower_below + decision.raise_above),
                decision.raise_above - decision.lower_below,
            )
            slope = 2.0 / max(width, 1e-3)
            falling = ((middle - z) * slope).clip(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
            decided = decision.floor + (1.0 - decision.floor) / (1.0 + exponential(falling, squarings=11))
        else:
            decided = np.where(
                z < decision.lower_below, decision.floor, np.where(z > decision.raise_above, 1.0, self.weight)
            )
        return np.where(told, np.rint(decided * ONE) / ONE, self.weight)
