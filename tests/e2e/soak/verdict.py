"""Whether something keeps growing, from samples over time."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

MIB = float(1 << 20)
"""Bytes."""


@dataclass(frozen=True, slots=True)
class Bound:
    """How much the mean of the last third may exceed that of the first: the larger of both.

    Attributes:
        share: of the first third's mean.
        slack: in the unit of the samples.
    """

    share: float
    slack: float


MEMORY = Bound(0.02, 10.0)
"""Of what is sampled in MiB."""
BOUNDS = {
    "server MiB": MEMORY,
    "trainer MiB": MEMORY,
    "redis MiB": MEMORY,
    "files": Bound(0.1, 5),
    "threads": Bound(0.1, 4),
    "tasks": Bound(0.1, 10),
    "policies": Bound(0.1, 2),
    "trainers known": Bound(0.1, 5),
    "log entries": Bound(0.2, 2000),
    "redis keys": Bound(0.1, 10),
}
"""By what is sampled. Thirds are means over many faults, so that sawteeth of sweeps and restarts cancel."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one series: means of its first and last third, and the most the last may be."""

    name: str
    first: float
    last: float
    most: float

    @property
    def grows(self) -> bool:
        """Whether it grew further than it may."""
        return self.last > self.most


def judge(name: str, samples: Sequence[float], bound: Bound) -> Verdict:
    """Compares the thirds of a series of at least 6 samples, taken at even times."""
    if len(samples) < 6:
        raise ValueError(f"{name}: {len(samples)} samples, must be at least 6 to compare thirds")
    third = len(samples) // 3
    first, last = fmean(samples[:third]), fmean(samples[-third:])
    return Verdict(name, first, last, first + max(bound.share * abs(first), bound.slack))
