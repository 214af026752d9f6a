"""Quantiles of what was seen lately: a few points of equal mass, merged with the values of every step.

One row of points for each group. All is float64 on the host, in one order: the same bits on every device.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from equipoise_server.rules.order import group_starts, stable_order

POINTS_PER_STRATUM = 4
"""Points that stand for the values of one stratum: its bounds lie half-way between two of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantiles:
    """The distribution of recent values, by group. G groups, Q points each.

    Attributes:
        points: float64 [G, Q], rising; point i stands for the values around the quantile (i + ½)/Q.
        mass: float64 [G], how many values the points of a group stand for; 0: none, and the points mean nothing.
    """

    points: NDArray[np.float64]
    mass: NDArray[np.float64]

    @classmethod
    def empty(cls, *, groups: int, strata: int) -> "Quantiles":
        """No values yet."""
        return cls(points=np.zeros((groups, POINTS_PER_STRATUM * strata)), mass=np.zeros(groups))

    def after(self, values: NDArray[np.float64], groups: NDArray[np.int64], *, window: float) -> "Quantiles":
        """The distribution with new values [B] of their groups [B] in it; about `window` values are remembered."""
        points, mass = self.points.copy(), self.mass.copy()
        for group, rows in _by_group(groups):
            new = values[rows]
            kept = mass[group] * (window / (window + len(new)))
            points[group] = _merged(points[group], kept, new)
            mass[group] = kept + len(new)
        return Quantiles(points=points, mass=mass)

    def strata(self, values: NDArray[np.float64], groups: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which stratum of its group each value [B] belongs to, in [0, S): how many bounds lie below it."""
        bounds, found = self.bounds, np.empty(len(values), np.int64)
        for group, rows in _by_group(groups):
            found[rows] = np.searchsorted(bounds[group], values[rows], side="left")
        return found

    @property
    def bounds(self) -> NDArray[np.float64]:
        """Between the strata of each group, float64 [G, S - 1], rising."""
        upper = self.points[:, POINTS_PER_STRATUM::POINTS_PER_STRATUM]
        lower = self.points[:, POINTS_PER_STRATUM - 1 : -1 : POINTS_PER_STRATUM]
        return lower + (upper - lower) * 0.5


def _by_group(groups: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Each group that is there, and its rows in their order."""
    order = stable_order(groups)
    starts = group_starts(groups[order])
    yield from zip(groups[order[starts]].tolist(), np.split(order, starts[1:]), strict=False)  # without rows: none


def _merged(points: NDArray[np.float64], mass: float, new: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points [Q] of equal mass for the old ones, which stand for `mass` values, and new values [n] together."""
    num_points = len(points)
    values, masses = new, np.ones(len(new))
    if mass > 0.0:
        values = np.concatenate([points, new])
        masses = np.concatenate([np.full(num_points, mass / num_points), masses])
    order = np.argsort(values, kind="stable")
    values, masses = values[order], masses[order]
    middles = np.cumsum(masses) - 0.5 * masses
    wanted = (np.arange(num_points) + 0.5) * ((mass + len(new)) / num_points)
    return np.maximum.accumulate(np.interp(wanted, middles, values))
