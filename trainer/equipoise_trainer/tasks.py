"""A task: examples to train on, the desired distribution in three disjoint sets, and which labels were flipped.

Shape legend: N training examples, M examples of target A, F features (bias included), C classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """A set of labelled examples.

    Attributes:
        features: float64 [n, F]; where the task has a bias, the last column is 1.
        labels: int64 [n], in [0, C).
    """

    features: NDArray[np.float64]
    labels: NDArray[np.int64]

    def __post_init__(self) -> None:
        if len(self.features) != len(self.labels):
            raise ValueError(f"labels: {len(self.labels)} for {len(self.features)} rows of features, must be equal")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> "Examples":
        """The examples at `rows` (indices [m], or a mask [n])."""
        return Examples(features=self.features[rows], labels=self.labels[rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a run learns and what it is measured on.

    Attributes:
        name: name of the data set.
        seed: what the split, the planted flips and the generator were drawn from.
        classes: C.
        train: the examples that a policy weighs; their index is their id. Some labels may be flipped.
        target: A, from the desired distribution: gives the direction of the contributions.
        guard: B, from the desired distribution: chooses settings and the step at which a run is read off.
        test: unseen examples of the desired distribution: measured, never used.
        flipped: bool [N]; True where the label of a training example was replaced by a wrong one.
    """

    name: str
    seed: int
    classes: int
    train: Examples
    target: Examples
    guard: Examples
    test: Examples
    flipped: NDArray[np.bool_]

    def splits(self) -> Iterator[tuple[str, Examples]]:
        """The four sets by name."""
        yield from (("train", self.train), ("target", self.target), ("guard", self.guard), ("test", self.test))

    @property
    def features(self) -> int:
        """F."""
        return int(self.train.features.shape[1])


def flip_labels(
    labels: NDArray[np.int64], *, classes: int, share: float, generator: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Plants wrong labels in exactly round(share·N) examples; each other class is equally likely.

    Returns:
        The labels, int64 [N], and which were flipped, bool [N]. The input is left as it is.
    """
    if not 0.0 <= share < 1.0:
        raise ValueError(f"flipped: {share}, must be at least 0 and below 1")
    flipped = np.zeros(len(labels), dtype=np.bool_)
    flipped[generator.permutation(len(labels))[: round(share * len(labels))]] = True
    offsets = generator.integers(1, classes, size=len(labels))
    return np.where(flipped, (labels + offsets) % classes, labels), flipped
