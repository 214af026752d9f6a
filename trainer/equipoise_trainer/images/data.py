"""scikit-learn's handwritten digits with wrong labels, and trusted ones beside them.

Shape legend: N training images, C classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Noise: TypeAlias = Literal["confused", "random"]
"""Each class is confused with one other, or with any."""

NOISES: Final[tuple[Noise, ...]] = get_args(Noise)
CLASSES: Final = 10
TARGET, GUARD, TEST = 100, 100, 497
"""Images of target A, guard B and the test set; the other 1100 of the 1797 are trained on."""


@dataclass(frozen=True, slots=True, eq=False)
class Images:
    """Images with labels.

    Attributes:
        pixels: float32 [n, 1, 8, 8], in [0, 1].
        labels: int64 [n], in [0, C).
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor | NDArray[np.int64]) -> "Images":
        """Some of them."""
        return Images(self.pixels[rows], self.labels[rows])

    def joined(self, other: "Images", *, times: int = 1) -> "Images":
        """These and `times` copies of the others."""
        return Images(
            torch.cat([self.pixels, *[other.pixels] * times]), torch.cat([self.labels, *[other.labels] * times])
        )

    def batches(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """(pixels, labels) in order, `size` at a time."""
        return list(zip(torch.split(self.pixels, size), torch.split(self.labels, size), strict=True))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImageTask:
    """What is learned from what.

    Attributes:
        train: the training images with the labels as they were given.
        wrong: bool [N], which of these labels are wrong.
        target: A, trusted.
        guard: B, trusted.
        test: unseen.
    """

    train: Images
    wrong: NDArray[np.bool_]
    target: Images
    guard: Images
    test: Images


def make_task(*, noise: Noise, share: float, seed: int) -> ImageTask:
    """The task of a seed, which decides about the split and the noise.

    Args:
        noise: `confused`: class 0 with 1, 2 with 3 and so on; `random`: with any other, each as likely.
        share: probability of a label to be wrong, in [0, 1).
        seed: not negative.
    """
    from sklearn.datasets import load_digits  # takes half a second to import

    random = np.random.default_rng(seed)
    digits = load_digits()
    order = random.permutation(len(digits.target))
    everything = Images(
        torch.from_numpy((digits.images[order, None] / 16).astype(np.float32)),
        torch.from_numpy(digits.target[order].astype(np.int64)),
    )
    edges = np.cumsum([TEST, TARGET, GUARD])
    test, target, guard, train = (everything.take(rows) for rows in np.split(np.arange(len(order)), edges))
    labels = train.labels.numpy()
    wrong = random.random(len(labels)) < share
    noisy = labels.copy()
    if noise == "confused":
        noisy[wrong] = labels[wrong] ^ 1
    else:
        noisy[wrong] = (labels[wrong] + random.integers(1, CLASSES, int(wrong.sum()))) % CLASSES
    return ImageTask(
        train=Images(train.pixels, torch.from_numpy(noisy)), wrong=wrong, target=target, guard=guard, test=test
    )


def order(count: int, *, batch: int, seed: int, epoch: int) -> Iterator[Tensor]:
    """The rows of each batch of an epoch, [batch] each; what is left over of an epoch is not trained on."""
    rows = np.random.default_rng((seed, epoch)).permutation(count)
    batch = min(batch, count)
    for start in range(0, count - batch + 1, batch):
        yield torch.from_numpy(rows[start : start + batch])
