"""The scaling law of training, L(t) = L0 + (B/t)^β, fitted to two policies with one L0 (arXiv 2402.17759, section 4.6).

(B, β) of one curve are hardly identifiable: another L0 fits as well and changes both. The acceleration is, so that it
is what counts; everything else stands with its spread and with its dependence on L0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from equipoise_trainer.perceptron import Array

POINTS = 60
"""Steps that a curve is fitted at, evenly spaced in ln t."""

STARTS: Final = (0.02, 0.05, 0.1, 0.2, 0.3)
"""Where fits may start, t0/T."""

FLOORS = 41
"""How many L0 are tried, from 0 to just below the lowest loss."""

SENSITIVITY: Final = (0.0, 0.05, 0.1, 0.5, 1.0, 1.5, 2.0)
"""L0 at which fits are repeated, nats; those above the lowest loss are left out."""

BOOTSTRAPS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """One curve's law for a given L0.

    Attributes:
        scale: B, steps.
        exponent: β.
        r_squared: of ln(L − L0) against ln t.
    """

    scale: float
    exponent: float
    r_squared: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Two laws with one L0.

    Attributes:
        floor: L0, nats.
        start: t0, steps.
        steps: T.
        uniform: law of uniform training.
        optimal: law of the near-optimal policy.
    """

    floor: float
    start: int
    steps: int
    uniform: Law
    optimal: Law

    @property
    def scale_change(self) -> float:
        """How much smaller B is, share: the paper's 96.6 % (its tables: 93.7 %)."""
        return 1 - self.optimal.scale / self.uniform.scale

    @property
    def exponent_change(self) -> float:
        """How much larger β is, share: the paper's 21.2 % (its tables: 18.7 and 16.7 %)."""
        return self.optimal.exponent / self.uniform.exponent - 1

    @property
    def acceleration(self) -> float:
        """Eq. 9 at T: T / (B₂·(T/B₁)^(β₁/β₂))."""
        return acceleration(self.uniform, self.optimal, steps=self.steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Median and the middle 90 % over bootstrap samples; written as the latter."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        """Of the samples."""
        low, middle, high = np.quantile(values, (0.05, 0.5, 0.95))
        return cls(low=float(low), middle=float(middle), high=float(high))

    def __format__(self, spec: str) -> str:
        return f"{self.low:{spec}} to {self.high:{spec}}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingFound:
    """The law of one family of runs, on unseen examples.

    Attributes:
        name: of the study.
        steps: T.
        measured: T over the first step at which the mean near-optimal loss is as low as uniform's at T; None: never.
        fit: of the mean curves over seeds.
        samples: fits of resampled seeds and windows.
        others: the same window with other L0.
        curves: mean losses over seeds, uniform and near-optimal, each [T+1], nats.
    """

    name: str
    steps: int
    measured: float | None
    fit: Fit
    samples: tuple[Fit, ...]
    others: tuple[Fit, ...]
    curves: tuple[Array, Array]

    @classmethod
    def of(cls, name: str, pairs: Sequence[tuple[Array, Array]]) -> "ScalingFound":
        """Fits uniform and near-optimal losses by seed."""
        uniform, optimal = (np.mean([pair[side] for pair in pairs], axis=0) for side in (0, 1))
        fit = search_pair(uniform, optimal)
        steps = len(uniform) - 1
        reached = np.flatnonzero(optimal <= uniform[-1])
        return cls(
            name=name,
            steps=steps,
            measured=steps / max(1, int(reached[0])) if len(reached) else None,
            fit=fit,
            samples=tuple(bootstrap(pairs)),
            others=tuple(sensitivity(uniform, optimal, start=fit.start)),
            curves=(uniform, optimal),
        )


def acceleration(uniform: Law, optimal: Law, *, steps: float) -> float:
    """Eq. 9: how many times fewer steps the second law needs for the first one's loss at `steps`."""
    needed = optimal.scale * (steps / uniform.scale) ** (uniform.exponent / optimal.exponent)
    return float(steps / needed)


def fit_law(losses: Array, *, floor: float, start: int, stop: int) -> Law:
    """Least squares of ln(L − L0) on ln t at steps evenly spaced in ln t.

    Args:
        losses: [T+1], nats, at θ_0 … θ_T.
        floor: L0, below all losses of the window.
        start: t0 ≥ 1.
        stop: last step.
    """
    steps = np.unique(np.geomspace(start, stop, POINTS).round().astype(np.int64))
    x, y = np.log(steps), np.log(losses[steps] - floor)
    slope, offset = np.polyfit(x, y, 1)
    residual = y - (slope * x + offset)
    spread = float(np.square(y - y.mean()).sum())
    exponent = -float(slope)
    return Law(
        scale=float(np.exp(offset / exponent)),
        exponent=exponent,
        r_squared=1 - float(np.square(residual).sum()) / spread,
    )


def fit_pair(uniform: Array, optimal: Array, *, floor: float, start: int, stop: int) -> Fit:
    """Both laws for a given L0 and window."""
    return Fit(
        floor=floor,
        start=start,
        steps=stop,
        uniform=fit_law(uniform, floor=floor, start=start, stop=stop),
        optimal=fit_law(optimal, floor=floor, start=start, stop=stop),
    )


def search_pair(uniform: Array, optimal: Array, *, starts: Sequence[float] = STARTS) -> Fit:
    """The L0 and t0 with the highest r², the lower of the two curves' counting; one L0 for both.

    Args:
        uniform: losses of uniform training, [T+1], nats.
        optimal: losses under the near-optimal policy, [T+1], nats.
        starts: t0/T that are tried.
    """
    stop = len(uniform) - 1
    best: Fit | None = None
    for share in starts:
        start = max(1, round(share * stop))
        lowest = min(float(uniform[start:].min()), float(optimal[start:].min()))
        for floor in np.linspace(0, 0.95 * lowest, FLOORS):
            found = fit_pair(uniform, optimal, floor=float(floor), start=start, stop=stop)
            if best is None or _quality(found) > _quality(best):
                best = found
    assert best is not None, "there is at least one start"
    return best


def sensitivity(uniform: Array, optimal: Array, *, start: int) -> list[Fit]:
    """The same window fitted with other L0."""
    stop = len(uniform) - 1
    lowest = min(float(uniform[start:].min()), float(optimal[start:].min()))
    return [
        fit_pair(uniform, optimal, floor=floor, start=start, stop=stop)
        for floor in SENSITIVITY
        if floor < 0.98 * lowest
    ]


def bootstrap(pairs: Sequence[tuple[Array, Array]], *, seed: int = 0, samples: int = BOOTSTRAPS) -> list[Fit]:
    """Fits of resampled seeds and windows: seeds with replacement, t0 from 2 to 30 % of T, the end from 70 to 100 %.

    Args:
        pairs: uniform and optimal losses by seed, each [T+1], nats; the mean over the drawn seeds is fitted.
        seed: of the resampling.
        samples: how many.
    """
    generator = np.random.default_rng(seed)
    fits = []
    for _ in range(samples):
        drawn = [pairs[index] for index in generator.integers(len(pairs), size=len(pairs))]
        stop = round((len(pairs[0][0]) - 1) * float(generator.uniform(0.7, 1.0)))
        uniform, optimal = (np.mean([pair[side][: stop + 1] for pair in drawn], axis=0) for side in (0, 1))
        fits.append(search_pair(uniform, optimal, starts=(float(generator.uniform(0.02, 0.3)),)))
    return fits


def _quality(fit: Fit) -> float:
    return min(fit.uniform.r_squared, fit.optimal.r_squared)
