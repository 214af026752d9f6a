"""Steps without a server: which sequences they train on, and how much each counts.

Shape legend: B sequences of a step.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from equipoise_trainer.lm.batches import ShuffledBatches
from equipoise_trainer.lm.costs import Meter
from equipoise_trainer.lm.learner import Learner
from equipoise_trainer.lm.methods import Data
from equipoise_trainer.lm.recipes import CLEAN, SOURCES, TextTask

MIXED: Final = 0.25
"""Share of a batch that `mixture` takes from target A."""
KEPT: Final = 0.5
"""Share of a batch that `trim` keeps: the sequences of lowest loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a run's steps work with.

    Attributes:
        task: the data.
        learner: the model in training; its gradients are what a step leaves behind.
        meter: counts what is computed.
        batch_size: B.
        seed: of the order of sequences and of all draws.
    """

    task: TextTask
    learner: Learner
    meter: Meter
    batch_size: int
    seed: int

    def batches(self, size: int, *, batch_size: int | None = None) -> ShuffledBatches:
        """Batches of `size` sequences in random order."""
        return ShuffledBatches(size, batch_size=batch_size or self.batch_size, seed=self.seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What a step was made of.

    Attributes:
        ids: training sequences, [n]; n is below B where other sequences take part.
        weights: how much each counted, [n].
    """

    ids: NDArray[np.int64]
    weights: NDArray[np.float64]


class Steps(ABC):
    """Makes the gradients of a run's steps."""

    @abstractmethod
    def make(self, step: int) -> Made:
        """Leaves the gradient of step `step`, from 0, in `.grad`."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs beyond the step."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken."""
        assert not state, "steps with a state of their own load it"


class PlainSteps(Steps):
    """Every sequence counts the same."""

    def __init__(self, around: Surroundings, *, data: Data = "train") -> None:
        self._around = around
        task = around.task
        self._target_rows = {"target": around.batch_size, "mixture": round(MIXED * around.batch_size)}.get(data, 0)
        clean = np.flatnonzero(task.sources == SOURCES.index(CLEAN))
        self._pool = clean if data == "oracle" else np.arange(len(task.train))
        own = around.batch_size - self._target_rows
        self._batches = around.batches(len(self._pool), batch_size=own) if own else None
        self._targets = around.batches(len(task.target), batch_size=max(self._target_rows, 1))

    def make(self, step: int) -> Made:
        """The mean loss of the batch."""
        task, around = self._around.task, self._around
        ids = np.zeros(0, np.int64) if self._batches is None else self._pool[self._batches.at(step)]
        rows = task.train[ids]
        if self._target_rows:
            rows = np.concatenate([rows, task.target[self._targets.at(step)]])
        around.learner.losses(rows).mean().backward()  # type: ignore[no-untyped-call]
        around.meter.plain += len(rows)
        return Made(ids=ids, weights=np.ones(len(ids)))


class TrimmedSteps(Steps):
    """Only the sequences of lowest loss in each batch count; the others have been computed all the same."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._batches = around.batches(len(around.task.train))

    def make(self, step: int) -> Made:
        """The mean loss of the kept ones."""
        around = self._around
        ids = self._batches.at(step)
        losses = around.learner.losses(around.task.train[ids])
        kept = torch.argsort(losses.detach(), stable=True)[: max(1, round(KEPT * len(ids)))]
        losses[kept].mean().backward()  # type: ignore[no-untyped-call]
        around.meter.plain += len(ids)
        weights = np.zeros(len(ids))
        weights[kept.numpy()] = len(ids) / len(kept)
        return Made(ids=ids, weights=weights)
