"""Examples with a known nature, planted to see what a near-optimal policy does with them (the paper's section 4.5)."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from equipoise_trainer.tasks import Examples, Task

COPIES = 8
"""How often a duplicated example occurs."""

GROUPS, EASY = 32, 128
MARGIN = 30.0
"""What an easy example's distance to the teacher's hyperplane is raised by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planted:
    """Which training examples are what.

    Attributes:
        flipped: bool [N]; their labels are wrong.
        easy: bool [N]; learned perfectly within a few steps.
        groups: int64 [G, 8], ids of equal examples; G may be 0.
    """

    flipped: NDArray[np.bool_]
    easy: NDArray[np.bool_]
    groups: NDArray[np.int64]

    @classmethod
    def of_flips(cls, flipped: NDArray[np.bool_]) -> "Planted":
        """Flips and nothing else."""
        return cls(
            flipped=flipped, easy=np.zeros(len(flipped), dtype=np.bool_), groups=np.zeros((0, COPIES), dtype=np.int64)
        )

    @property
    def plain(self) -> NDArray[np.bool_]:
        """bool [N]; neither flipped nor easy nor duplicated."""
        plain = ~(self.flipped | self.easy)
        plain[self.groups.ravel()] = False
        return plain


def plant(task: Task, *, seed: int) -> tuple[Task, Planted]:
    """Replaces examples of the training set: 32 groups of 8 equal ones, and 128 that are easy.

    An easy example is moved away from the teacher's hyperplane, on its own side, so that it is learned perfectly (loss
    below 1e-6) once the model has found the direction. The direction is that of a least-squares fit to the clean
    labels, since a task does not tell its teacher.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(np.flatnonzero(~task.flipped)).astype(np.int64)
    groups = order[: GROUPS * COPIES].reshape(GROUPS, COPIES)
    easy = order[GROUPS * COPIES : GROUPS * COPIES + EASY]
    features, labels = task.train.features.copy(), task.train.labels.copy()
    features[groups] = features[groups[:, :1]]
    labels[groups] = labels[groups[:, :1]]
    signs = 2.0 * labels - 1.0
    clean = ~task.flipped
    direction = np.linalg.lstsq(task.train.features[clean], (2.0 * task.train.labels - 1.0)[clean], rcond=None)[0]
    direction /= np.linalg.norm(direction)
    features[easy] += MARGIN * signs[easy, None] * direction
    mask = np.zeros(len(labels), dtype=np.bool_)
    mask[easy] = True
    planted = Planted(flipped=task.flipped, easy=mask, groups=groups)
    return replace(task, train=Examples(features=features, labels=labels)), planted
