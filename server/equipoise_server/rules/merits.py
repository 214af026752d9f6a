"""What the contributions of a stratum say about it: mean over standard error, and the weight that follows."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from equipoise_server.rules.exponential import exponential
from equipoise_server.rules.weights import ONE

OWN_SHARE = 0.2
"""Of `Decision.min_count`: what a stratum needs itself."""

_LEAST_VARIANCE = 1e-9
"""Of contributions in units of their running RMS: equal ones have an error, too."""

_LARGEST_EXPONENT = 30.0
"""A logistic function beyond it is 0 or 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """How contributions decide.

    Attributes:
        min_count: strata of a group keep their weights until a contribution's stratum has so many in the mean; one
            with less than a fifth of it keeps its weight in any group.
        lower_below: z below which a stratum gets the floor.
        raise_above: z above which it gets full weight again.
        soft: weights rise smoothly with z instead, half-way at the middle of these two.
        floor: smallest weight, a multiple of 2^-30.
        smoothing: weight of each neighbour of a stratum in its z, in [0, 1].
    """

    min_count: float
    lower_below: float
    raise_above: float
    soft: bool
    floor: float
    smoothing: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Merits:
    """Contributions of each stratum, older ones fading, and the weights that they led to. S strata of all groups.

    Attributes:
        of_group: strata of one group: they lie one after another by rising loss, group after group.
        count: float64 [S], how many contributions.
        total: float64 [S], their sum, in units of the running RMS.
        square: float64 [S], the sum of their squares.
        weight: float64 [S], in [floor, 1].
    """

    of_group: int
    count: NDArray[np.float64]
    total: NDArray[np.float64]
    square: NDArray[np.float64]
    weight: NDArray[np.float64]

    @classmethod
    def none(cls, *, strata: int, groups: int) -> "Merits":
        """No contributions to so many strata of each group: all weights are 1."""
        count, total, square = np.zeros((3, strata * groups))
        return cls(of_group=strata, count=count, total=total, square=square, weight=np.ones(strata * groups))

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

    def told(self, decision: Decision) -> NDArray[np.bool_]:
        """Which strata have enough contributions [S]: those of a group begin together, so that none is alone.

        That is once a contribution's stratum has `min_count` in the mean over contributions: empty strata, as there are
        where losses have few values, do not count.
        """
        rows = self.count.reshape(-1, self.of_group)
        enough = (rows * rows).sum(axis=1) >= decision.min_count * rows.sum(axis=1)
        return np.repeat(enough, self.of_group) & (self.count >= max(OWN_SHARE * decision.min_count, 1.0))

    def contrast(self, decision: Decision) -> float | None:
        """F: how much more the means differ than their errors explain, among strata with enough contributions.

        About 1 where chance explains it all; None for fewer than two such strata.
        """
        told = self.told(decision)
        if told.sum() < 2:
            return None
        means, precision = self.means[told], 1.0 / np.square(self.errors[told])  # pow differs between processors
        middle = float((precision * means).sum()) / float(precision.sum())
        return float((precision * np.square(means - middle)).sum()) / (len(means) - 1)

    def z(self, decision: Decision) -> NDArray[np.float64]:
        """Mean over error [S], of each stratum and its neighbours; 0 where it has too few contributions.

        Strata of about the same loss are alike: a neighbour's contributions count for `smoothing` of one's own, so that
        what is decided follows the loss smoothly, and has more than twice the evidence. The error is that of a weighted
        mean: variance · Σk² / (Σk)², k the weights of its contributions.
        """
        share = decision.smoothing
        count, total, square = (self._smoothed(values, share) for values in (self.count, self.total, self.square))
        squares = self._smoothed(self.count, share * share)
        told = self.told(decision)
        some = np.maximum(count, 1.0)
        means = total / some
        variance = np.maximum(square / some - means * means, _LEAST_VARIANCE)
        return np.where(told, means / np.sqrt(variance * squares / (some * some)).clip(min=1e-12), 0.0)

    def _smoothed(self, values: NDArray[np.float64], share: float) -> NDArray[np.float64]:
        """Each value with that share of its neighbours' in the group."""
        rows = values.reshape(-1, self.of_group)
        found = rows.copy()
        found[:, 1:] += rows[:, :-1] * share
        found[:, :-1] += rows[:, 1:] * share
        return found.ravel()

    def _weights(self, decision: Decision) -> NDArray[np.float64]:
        told = self.told(decision)
        z = self.z(decision)
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
