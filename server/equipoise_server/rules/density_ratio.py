"""How often the target's losses lie where those of the training examples do.

Shape legend: G groups, S strata of each.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from equipoise_server.rules.quantiles import Quantiles


@dataclass(frozen=True, slots=True, kw_only=True)
class DensityRatio:
    """Losses of training and target examples under the model of one step, counted by stratum, older ones fading.

    Were the training examples like the target's, both would have their losses at the same places. Where the training
    examples have many and the target few, as wrong labels have high losses and easy text off the target has low ones,
    the ratio of the shares is the weight that makes one distribution of the other (importance weighting).

    Attributes:
        quantiles: of recent losses of training examples, each as it was reported.
        own: float64 [G, S], how many of these, by stratum.
        target: float64 [G, S], how many losses of the target.
    """

    quantiles: Quantiles
    own: NDArray[np.float64]
    target: NDArray[np.float64]

    @classmethod
    def none(cls, *, strata: int, groups: int) -> "DensityRatio":
        """No losses yet."""
        own, target = np.zeros((2, groups, strata))
        return cls(quantiles=Quantiles.empty(groups=groups, strata=strata), own=own, target=target)

    def after(
        self,
        losses: NDArray[np.float64],
        groups: NDArray[np.int64],
        *,
        target_losses: NDArray[np.float64],
        target_groups: NDArray[np.int64],
        window: float,
        memory: float,
    ) -> "DensityRatio":
        """With new losses [B] of training examples and [A] of the target in it.

        Args:
            losses: of training examples, nats.
            groups: their groups.
            target_losses: of target examples, nats.
            target_groups: their groups.
            window: how many losses of training examples a group remembers, about.
            memory: how many of the target.
        """
        quantiles = self.quantiles.after(losses, groups, window=window)
        known = quantiles.mass[target_groups] > 0.0  # of other groups nothing can be compared yet
        target_losses, target_groups = target_losses[known], target_groups[known]
        return DensityRatio(
            quantiles=quantiles,
            own=_counted(self.own, quantiles, losses, groups, memory=window),
            target=_counted(self.target, quantiles, target_losses, target_groups, memory=memory),
        )

    def ratio(self, *, min_count: float, smoothing: float) -> NDArray[np.float64]:
        """Share of the target's losses over that of the training examples', at most 1: float64 [G, S].

        A neighbour in the group counts for `smoothing` of a stratum. 1 in a group with fewer than `min_count` losses of
        the target.
        """
        shares = [_smoothed(counts, smoothing) for counts in (self.target, self.own)]
        totals = [counts.sum(axis=1, keepdims=True) for counts in shares]
        told = (self.target.sum(axis=1, keepdims=True) >= min_count) & (totals[1] > 0.0) & (shares[1] > 0.0)
        wanted, there = (share * total for share, total in zip(shares, reversed(totals), strict=True))
        return np.where(told, np.minimum(wanted / np.where(told, there, 1.0), 1.0), 1.0)


def _counted(
    counts: NDArray[np.float64],
    quantiles: Quantiles,
    values: NDArray[np.float64],
    groups: NDArray[np.int64],
    *,
    memory: float,
) -> NDArray[np.float64]:
    num_groups, strata = counts.shape
    cells = groups * strata + quantiles.strata(values, groups)
    new = np.bincount(cells, minlength=num_groups * strata).reshape(counts.shape).astype(np.float64)
    return np.asarray(counts * (memory / (memory + new.sum(axis=1, keepdims=True))) + new)


def _smoothed(counts: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    """Each count with that share of its neighbours'."""
    found = counts.copy()
    found[:, 1:] += counts[:, :-1] * share
    found[:, :-1] += counts[:, 1:] * share
    return found
