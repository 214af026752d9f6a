"""Maps: from an example's statistic to its raw weight in [floor, 1]."""

from collections.abc import Callable
from typing import TypeAlias

from equipoise_server.rules.arrays import Array, namespace

ONE = 1 << 30
"""The raw weight 1: int32 holds [0, 1] in steps of 2^-30."""

WeightMap: TypeAlias = Callable[[Array], Array]
"""Raw weights [B], whole numbers in [floor, ONE], from statistics float64 [B]."""


def fixed_point(value: float, one: int = ONE) -> int:
    """The multiple of 1/one nearest to `value`, ties to even."""
    return round(value * one)


def threshold(above: float, *, floor: float) -> WeightMap:
    """1 where the statistic is above `above`, else the floor."""
    low = fixed_point(floor)
    return lambda statistic: namespace(statistic).where(statistic > above, ONE, low)


def ramp(start: float, *, width: float, floor: float) -> WeightMap:
    """Linear between the floor at `start` and 1 `width` above it."""
    low, slope = fixed_point(floor), 1.0 / width

    def raw_weights(statistic: Array) -> Array:
        xp = namespace(statistic)
        return xp.round(xp.clip((statistic - start) * slope, 0.0, 1.0) * (ONE - low)) + low

    return raw_weights
