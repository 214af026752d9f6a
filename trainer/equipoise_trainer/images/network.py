"""A network of two convolutions, and how it is trained in plain PyTorch.

Shape legend: N training images, B of a batch, C classes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from numpy.typing import NDArray
from torch import Tensor, nn

from equipoise_trainer.images.data import CLASSES, Images, order

Select: TypeAlias = Callable[[int, Tensor, Tensor], Tensor]
"""From epoch, rows [B] and losses [B] to the weight of each row, [B]; the loss is their weighted mean over B."""
Watch: TypeAlias = Callable[[Tensor, Tensor], None]
"""Told of rows [B] and logits [B, C] of each batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How a network is trained.

    Attributes:
        epochs: passes over the data.
        batch: images of a step.
        learning_rate: of Adam.
        seed: of the network and the order.
    """

    epochs: int
    batch: int
    learning_rate: float
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Loss, nats, and accuracy, in [0, 1], on a set of images."""

    loss: float
    accuracy: float


@dataclass(slots=True, eq=False)
class Losses:
    """What the losses of N examples were over a run.

    Attributes:
        total: their sums, [N].
        visits: how often each was seen, [N].
        smoothed: their averages, of which a visit keeps 0.7, [N]; NaN where never seen.
    """

    total: NDArray[np.float64]
    visits: NDArray[np.int64]
    smoothed: NDArray[np.float64]

    @classmethod
    def of(cls, count: int) -> "Losses":
        """Of examples that were not seen yet."""
        return cls(np.zeros(count), np.zeros(count, np.int64), np.full(count, np.nan))

    def note(self, rows: Tensor, losses: Tensor) -> None:
        """Notes a batch: [B] each, no row twice."""
        index, values = rows.numpy(), losses.detach().double().numpy()
        self.total[index] += values
        self.visits[index] += 1
        before = self.smoothed[index]
        self.smoothed[index] = np.where(np.isnan(before), values, 0.7 * before + 0.3 * values)

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean loss of each example, nats: [N]; NaN where never seen."""
        return np.where(self.visits > 0, self.total / np.maximum(self.visits, 1), np.nan)


@dataclass(slots=True, eq=False)
class Trained:
    """A network, and what was seen while it was trained.

    Attributes:
        network: the network.
        losses: of the training images.
        curve: scores after each epoch on the images that were given for it.
    """

    network: nn.Module
    losses: Losses
    curve: list[Score] = field(default_factory=list)


def build(seed: int, *, classes: int = CLASSES) -> nn.Module:
    """A new network: 38,000 parameters."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )


def example_losses(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of each image of (pixels, labels), nats: [B]."""
    pixels, labels = batch
    return F.cross_entropy(network(pixels), labels, reduction="none")


@torch.no_grad()
def score(network: nn.Module, images: Images) -> Score:
    """Loss and accuracy on images."""
    logits = network(images.pixels)
    return Score(
        loss=float(F.cross_entropy(logits, images.labels)),
        accuracy=float((logits.argmax(1) == images.labels).float().mean()),
    )


@torch.no_grad()
def probabilities(network: nn.Module, images: Images) -> NDArray[np.float64]:
    """Predicted probabilities, [n, C]."""
    predicted: NDArray[np.float64] = torch.softmax(network(images.pixels).double(), dim=1).numpy()
    return predicted


def train(
    images: Images,
    schedule: Schedule,
    *,
    classes: int = CLASSES,
    select: Select | None = None,
    watch: Watch | None = None,
    test: Images | None = None,
) -> Trained:
    """Trains a new network with Adam.

    Args:
        images: what it is trained on.
        schedule: how.
        classes: of the labels.
        select: weights of the rows of each batch; None: all 1.
        watch: told of each batch before its step.
        test: what the curve is measured on; None: it stays empty.
    """
    result = Trained(build(schedule.seed, classes=classes), Losses.of(len(images)))
    optimizer = torch.optim.Adam(result.network.parameters(), lr=schedule.learning_rate)
    for epoch in range(schedule.epochs):
        for rows in order(len(images), batch=schedule.batch, seed=schedule.seed, epoch=epoch):
            batch = images.take(rows)
            logits = result.network(batch.pixels)
            losses = F.cross_entropy(logits, batch.labels, reduction="none")
            if watch is not None:
                watch(rows, logits.detach())
            weighted = losses if select is None else select(epoch, rows, losses.detach()) * losses
            optimizer.zero_grad()
            weighted.mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            result.losses.note(rows, losses)
        if test is not None:
            result.curve.append(score(result.network, test))
    return result
