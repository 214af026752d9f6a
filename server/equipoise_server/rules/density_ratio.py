"""How often the target's losses lie where those of the training examples do.

Shape legend: G groups, S strata of each, B training examples and A target examples of a step.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class DensityRatio:
    """Where losses of the target lie among those of training examples, under the model of the same step.

    Were the training examples like the target's, a loss of the target would fall into each of the B + 1 gaps between
    their B sorted losses equally often, whatever the model. Where the target has fewer, training examples are that are
    unlike it: wrong labels have high losses, easy text off the target has low ones. The ratio of the shares is the
    weight that makes one distribution of the other (importance weighting).

    Attributes:
        target: float64 [G, S], how many losses of the target lay in each stratum, older ones fading. A gap is a part
            of one stratum, or of several, and a loss counts for each by its part.
    """

    target: NDArray[np.float64]

    @classmethod
    def none(cls, *, strata: int, groups: int) -> "DensityRatio":
        """No losses yet."""
        return cls(target=np.zeros((groups, strata)))

    def after(
        self,
        losses: NDArray[np.float64],
        groups: NDArray[np.int64],
        *,
        target_losses: NDArray[np.float64],
        target_groups: NDArray[np.int64] | None,
        memory: float,
    ) -> "DensityRatio":
        """With the losses of a step in it.

        Args:
            losses: of training examples, nats, [B].
            groups: their groups, [B].
            target_losses: of target examples, nats, [A].
            target_groups: their groups, [A]; None: each is one of every group.
            memory: how many losses of the target a group remembers, about.
        """
        target = self.target.copy()
        for group in np.unique(groups):
            own = target_losses if target_groups is None else target_losses[target_groups == group]
            if len(own):
                parts = _parts(own, np.sort(losses[groups == group]), strata=target.shape[1])
                target[group] = target[group] * (memory / (memory + len(own))) + parts
        return DensityRatio(target=target)

    def ratio(self, *, min_count: float, smoothing: float) -> NDArray[np.float64]:
        """Share of the target's losses over that of the training examples', at most 1: float64 [G, S].

        A neighbour in the group counts for `smoothing` of a stratum. 1 in a group with fewer than `min_count` losses of
        the target.
        """
        total = self.target.sum(axis=1, keepdims=True)
        told = (total >= min_count) & (total > 0.0)
        shares = _smoothed(self.target, smoothing) / _smoothed(np.ones_like(self.target), smoothing)
        return np.where(told, np.minimum(shares * self.target.shape[1] / np.where(told, total, 1.0), 1.0), 1.0)


def _parts(values: NDArray[np.float64], known: NDArray[np.float64], *, strata: int) -> NDArray[np.float64]:
    """How many of `values` lie in each stratum of `known`, which is sorted: float64 [S]."""
    gaps = len(known) + 1
    low = np.searchsorted(known, values, side="left")[:, None] / gaps
    high = (np.searchsorted(known, values, side="right")[:, None] + 1) / gaps
    bounds = np.arange(strata + 1) / strata
    common = np.minimum(high, bounds[1:]) - np.maximum(low, bounds[:-1])
    return np.asarray((np.maximum(common, 0.0) / (high - low)).sum(axis=0))


def _smoothed(counts: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    """Each count with that share of its neighbours'."""
    found = counts.copy()
    found[:, 1:] += counts[:, :-1] * share
    found[:, :-1] += counts[:, 1:] * share
    return found
