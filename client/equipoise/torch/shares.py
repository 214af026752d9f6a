"""Shares of sources in a mixture, and how many draws of a stretch each source gets.

Shape legend: S sources.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from equipoise.errors import require

UNLIMITED: int = np.iinfo(np.int64).max
"""Draws that are left of a source that never ends."""


def shares_of(
    sizes: NDArray[np.float64],
    weights: NDArray[np.float64],
    *,
    temperature: float,
    minimum: NDArray[np.float64],
    open_: NDArray[np.bool_],
) -> NDArray[np.float64]:
    """The share of each source: `n^(1/τ)·w`, scaled to the sum 1, where that is not below the source's minimum.

    Sources below their minimum get it exactly, and the others share what is left in the same proportions.

    Args:
        sizes: natural sizes n, positive: [S].
        weights: what the policy says, not negative: [S].
        temperature: τ: 1 is natural, and the larger it is, the more equal sources of different sizes are.
        minimum: smallest shares, with a sum of at most 1: [S].
        open_: which sources can be drawn from, [S]; the others get 0.

    Returns:
        [S], with the sum 1; where the weights of all open sources are 0, as if all were equal.
    """
    natural = np.where(open_, (sizes / sizes[open_].max()) ** (1 / temperature), 0.0)
    wanted = natural * weights
    wanted = wanted if wanted.sum() > 0 else natural
    minimum = np.where(open_, minimum, 0.0)
    raised = np.zeros(len(sizes), dtype=np.bool_)
    shares: NDArray[np.float64] = wanted / wanted.sum()
    while (below := ~raised & (shares < minimum)).any():
        raised |= below
        rest = wanted[~raised].sum()
        if not rest > 0:  # the minima are all there is
            shares = minimum / minimum.sum()
            break
        shares = np.where(raised, minimum, wanted / rest * max(0.0, 1 - minimum[raised].sum()))
    return shares


def apportioned(
    shares: NDArray[np.float64], count: int, *, left: NDArray[np.int64], random: np.random.Generator
) -> NDArray[np.int64]:
    """How many of some draws each source gets, by systematic sampling: its share of them, rounded up or down.

    A source of which not so many are left gives these, and the others share the rest in the same proportions.

    Args:
        shares: [S].
        count: how many draws.
        left: how many each source has left, [S].
        random: decides who is rounded up, in proportion.

    Returns:
        [S], with the sum `count`, or less where all sources end before.
    """
    counts = np.zeros(len(shares), dtype=np.int64)
    open_ = (shares > 0) & (left > 0)
    while (missing := count - int(counts.sum())) > 0 and open_.any():
        edges = np.cumsum(np.where(open_, shares, 0.0))
        points = np.minimum((random.random() + np.arange(missing)) / missing, np.nextafter(1.0, 0.0))
        found = np.searchsorted(edges / edges[-1], points, side="right")
        counts = np.minimum(counts + np.bincount(found, minlength=len(shares)), left)
        open_ &= counts < left
    return counts


class Proportions:
    """How natural sizes and weights become shares, by the options of a `Mixture`, which documents them.

    Args:
        names: of the sources, [S].
        sizes: natural sizes by name; None: the lengths.
        temperature: of the natural sizes.
        minimum: smallest share of each, or by name.

    Raises:
        InvalidRequestError: an argument breaks a rule.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        sizes: Mapping[str, float] | None,
        temperature: float,
        minimum: float | Mapping[str, float],
    ) -> None:
        fits = math.isfinite(temperature) and temperature > 0
        require(fits, field="temperature", value=temperature, rule="must be positive and finite")
        by_name = minimum if isinstance(minimum, Mapping) else dict.fromkeys(names, minimum)
        for field, values in (("sizes", sizes or {}), ("minimum", by_name)):
            for name in values:
                require(name in names, field=field, value=name, rule="there is no such source")
        for name, size in (sizes or {}).items():
            fits = math.isfinite(size) and size > 0
            require(fits, field=f"sizes[{name!r}]", value=size, rule="must be positive and finite")
        for name, share in by_name.items():
            require(0 <= share <= 1, field=f"minimum[{name!r}]", value=share, rule="must be in [0, 1]")
        missing = [name for name in names if sizes is not None and name not in sizes]
        require(not missing, field="sizes", value=missing, rule="must be given of every source, or of none")
        total = math.fsum(by_name.values())
        require(total <= 1 + 1e-9, field="minimum", value=total, rule="smallest shares must have a sum of at most 1")
        self._temperature = temperature
        self._sizes = None if sizes is None else np.array([sizes[name] for name in names], dtype=np.float64)
        self._minimum = np.array([by_name.get(name, 0.0) for name in names], dtype=np.float64)

    @property
    def need_lengths(self) -> bool:
        """Whether natural sizes are lengths."""
        return self._sizes is None

    def shares(
        self, weights: NDArray[np.float64], lengths: NDArray[np.int64], open_: NDArray[np.bool_]
    ) -> NDArray[np.float64]:
        """The share of each source, [S]; all 0 where none is open.

        Args:
            weights: what the policy says, [S].
            lengths: of the sources, [S]; what they are where sizes were given, or of those not open, does not matter.
            open_: which can be drawn from, [S].
        """
        if not open_.any():
            return np.zeros(len(weights))
        sizes = np.where(open_, lengths, 1).astype(np.float64) if self._sizes is None else self._sizes
        return shares_of(sizes, weights, temperature=self._temperature, minimum=self._minimum, open_=open_)
