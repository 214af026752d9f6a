"""What `strata` keeps beside its tables, as scalars, and back."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from equipoise_server.rules.base import RuleError, Scalars
from equipoise_server.rules.density_ratio import DensityRatio
from equipoise_server.rules.merits import Merits
from equipoise_server.rules.quantiles import POINTS_PER_STRATUM, Quantiles
from equipoise_server.rules.scale import MEAN_SQUARE, scaled

_POINT, _MASS, _COUNT, _SUM, _SQUARE, _WEIGHT = "point.", "mass.", "count.", "sum.", "square.", "weight."
_TARGET = "target."
"""Of the density ratio: losses of the target by stratum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StrataScalars:
    """Quantiles of losses, merits and density ratio under their names.

    Attributes:
        strata: of each group.
        groups: how many.
        floor: smallest raw weight.
        rule: name of the rule, for errors.
    """

    strata: int
    groups: int
    floor: float
    rule: str
    _names: Mapping[str, tuple[str, ...]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_names", _names(self.groups, self.strata))

    def quantiles(self, scalars: Mapping[str, float]) -> Quantiles:
        """The distribution of recent losses."""
        if _MASS + "0" not in scalars:
            return Quantiles.empty(groups=self.groups, strata=self.strata)
        points, mass = (_array(scalars, self._names[prefix]) for prefix in (_POINT, _MASS))
        return Quantiles(points=points.reshape(self.groups, -1), mass=mass)

    def merits(self, scalars: Mapping[str, float]) -> Merits:
        """What contributions say about the strata."""
        if _COUNT + "0" not in scalars:
            return Merits.none(strata=self.strata, groups=self.groups)
        count, total, square, weight = (_array(scalars, self._names[name]) for name in (_COUNT, _SUM, _SQUARE, _WEIGHT))
        return Merits(of_group=self.strata, count=count, total=total, square=square, weight=weight)

    def density(self, scalars: Mapping[str, float]) -> DensityRatio | None:
        """How often the target's losses lie where those of the training examples do; None: it was never told."""
        if _TARGET + "0" not in scalars:
            return None
        return DensityRatio(target=_array(scalars, self._names[_TARGET]).reshape(self.groups, -1))

    def pack(self, mean_square: float, quantiles: Quantiles, merits: Merits, density: DensityRatio | None) -> Scalars:
        """All of it."""
        scalars = {MEAN_SQUARE: mean_square}
        for prefix, values in (
            *(() if density is None else ((_TARGET, density.target.ravel()),)),
            (_POINT, quantiles.points.ravel()),
            (_MASS, quantiles.mass),
            (_COUNT, merits.count),
            (_SUM, merits.total),
            (_SQUARE, merits.square),
            (_WEIGHT, merits.weight),
        ):
            scalars.update(zip(self._names[prefix], values.tolist(), strict=True))
        return scalars

    def check(self, scalars: Mapping[str, float]) -> None:
        """Raises RuleError unless the rule may have written them: all or none."""
        if not scalars:
            return
        scaled(np.zeros(0), scalars.get(MEAN_SQUARE, 0.0), rule=self.rule)
        for prefix, low, high in (
            *(((_TARGET, 0.0, math.inf),) if _TARGET + "0" in scalars else ()),
            (_POINT, -math.inf, math.inf),
            (_MASS, 0.0, math.inf),
            (_COUNT, 0.0, math.inf),
            (_SUM, -math.inf, math.inf),
            (_SQUARE, 0.0, math.inf),
            (_WEIGHT, self.floor, 1.0),
        ):
            names = self._names[prefix]
            values = [scalars.get(name, math.nan) for name in names]
            for name, value in zip(names, values, strict=True):
                if not (low <= value <= high and math.isfinite(value)):
                    raise RuleError(name, f"{name} = {value}: rule {self.rule} never writes that")
        falls = np.diff(self.quantiles(scalars).points, prepend=-np.inf).ravel() < 0.0
        if falls.any():
            name = self._names[_POINT][int(np.argmax(falls))]
            raise RuleError(
                name, f"{name} = {scalars[name]}: points of a group rise; rule {self.rule} never writes that"
            )


def _names(groups: int, strata: int) -> dict[str, tuple[str, ...]]:
    """Names of the scalars by their prefix."""
    cells = groups * strata
    sizes = {
        _POINT: POINTS_PER_STRATUM * cells,
        _MASS: groups,
        **dict.fromkeys((_COUNT, _SUM, _SQUARE, _WEIGHT, _TARGET), cells),
    }
    return {prefix: tuple(f"{prefix}{index}" for index in range(size)) for prefix, size in sizes.items()}


def _array(scalars: Mapping[str, float], names: tuple[str, ...]) -> NDArray[np.float64]:
    return np.array([scalars[name] for name in names])
