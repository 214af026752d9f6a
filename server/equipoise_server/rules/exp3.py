"""`exp3`: sources as the arms of a bandit whose rewards are their losses; Online Data Mixing."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from equipoise_server.rules.arrays import Array, here, namespace
from equipoise_server.rules.base import RuleError, Scalars
from equipoise_server.rules.settings import MAX_DECAY, MIN_FLOOR, RuleSettings, number
from equipoise_server.rules.sources import SOURCES, Columns, Nats, SourceRule
from equipoise_server.rules.table import RAW
from equipoise_server.rules.weights import ONE

RATE = "rate"
"""Scalar: E_t, the exploration rate of the last step."""
NEXT_RATE = "next_rate"
"""Scalar: E_{t+1}."""

MAX_REWARD = 1e30
"""Rewards are held within it, so that float32 holds them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exp3Settings(RuleSettings):
    """Settings of `exp3`."""

    reward_decay: float = number(0.9, low=0.0, high=MAX_DECAY)
    """α, decay per visit of a source's estimated reward."""

    temperature: float = number(1.0, low=0.01, high=1e3)
    """τ, by which the estimated rewards are divided; 1 in the paper."""

    floor: float = number(0.0, low=MIN_FLOOR, high=1.0, or_zero=True)
    """Smallest weight, beside what the exploration rate, which falls, leaves to every source."""


class Exp3(SourceRule):
    """π_{t+1} = (1-K·E_{t+1})·softmax(E_t·R) + E_{t+1}, R ← α·R + (1-α)·loss/π_t of the sources in step t; w = K·π.

    Algorithm 1 of Albalak et al. 2023 (arXiv 2312.02406): Exp3 (Auer et al. 2002) with a moving average of rewards, and
    the exploration rate E_t = min{1/K, √(ln K/(K·t))}, E_0 = 1/K. Weights are uniform for K·ln K steps. Dividing by the
    share of a source makes up for how seldom it is drawn: its estimate moves as if every step had it. As E_t falls, so
    does what rewards differ by in the exponent.
    """

    def __init__(self, settings: Exp3Settings) -> None:
        decay = settings.reward_decay

        def advance(old: Array, new: Array, first: Array) -> Array:
            """Estimates start from 0, as in the paper."""
            return namespace(old).clip(old * decay + new * (1.0 - decay), -MAX_REWARD, MAX_REWARD)

        super().__init__(
            settings,
            scale=Nats(rule="exp3"),
            advance=advance,
            rate=1.0 / settings.temperature,
            floor=settings.floor,
            statistic="reward",
        )

    def pace(self, *, sources: float, time: float) -> Scalars:
        """E_t and E_{t+1}."""
        return {RATE: exploration_rate(time, sources), NEXT_RATE: exploration_rate(time + 1.0, sources)}

    def rate(self, scalars: Scalars) -> float:
        """E_t/τ."""
        return scalars[RATE] * self._rate

    def uniform_share(self, scalars: Scalars) -> float:
        """K·E_{t+1}, at least the floor."""
        return min(max(scalars[SOURCES] * scalars[NEXT_RATE], self._floor), 1.0)

    def visit(
        self, old: Columns, signal: NDArray[np.float64], counts: NDArray[np.int64], scalars: Scalars
    ) -> dict[str, Array]:
        """Rewards loss/π_t, π_t the share before the step."""
        raw = here(old[RAW])
        weights = np.where(raw < 0, ONE, raw).clip(min=1) * (1.0 / ONE)
        return super().visit(old, signal * (scalars[SOURCES] / weights), counts, scalars)

    def _check_scalars(self, scalars: Scalars) -> None:
        super()._check_scalars(scalars)
        for name in (RATE, NEXT_RATE):
            rate = scalars.get(name, math.nan)
            if not 0.0 <= rate <= 1.0:
                raise RuleError(name, f"{name} = {rate}: rule {self.name} needs a number in [0, 1]")


def exploration_rate(time: float, sources: float) -> float:
    """E_t = min{1/K, √(ln K/(K·t))} at time t >= 1 for K sources."""
    return min(1.0 / sources, math.sqrt(math.log(sources) / (sources * time)))
