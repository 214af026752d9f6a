"""The search: policy epochs one after another, each a training run forwards and pulled back."""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic

import numpy as np
from numpy.typing import NDArray

from equipoise_trainer.analysis import similarity
from equipoise_trainer.offline.adjoint import Stop, move_rows, pull_back
from equipoise_trainer.offline.copies import RowCopy
from equipoise_trainer.offline.measures import LOOKS, Measures, looked_steps, measure
from equipoise_trainer.offline.path import MEMORY_BYTES, RunPath
from equipoise_trainer.offline.planted import Planted
from equipoise_trainer.offline.problem import Problem, Statistics, V
from equipoise_trainer.offline.rows import RowHolder, Weights
from equipoise_trainer.perceptron import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchPlan:
    """How a search goes, beside its rows.

    Attributes:
        measured: policy epochs after which the run is measured; 0 is the uniform policy.
        tested: those after which unseen examples are measured too.
        looks: about how many steps are looked at closely.
        memory_bytes: memory for parameters of one run.
        warm_up: policy epochs over which what is sent grows linearly to the whole contributions. The adjoint is largest
            along the uniform policy's run, whose whole length its loss stays high: a first move by all of it
            overshoots, and the area rises.
    """

    measured: Collection[int]
    tested: Collection[int]
    looks: int = LOOKS
    memory_bytes: int = MEMORY_BYTES
    warm_up: int = 0

    def __post_init__(self) -> None:
        if self.warm_up < 0:
            raise ValueError(f"warm_up: {self.warm_up}, must be at least 0")

    def scale(self, epoch: int) -> float:
        """What contributions are multiplied by in a policy epoch."""
        return min(1.0, (epoch + 1) / max(1, self.warm_up))


def spread_epochs(policy_epochs: int, *, count: int) -> list[int]:
    """About `count` policy epochs, dense at first, with 0 and the last."""
    raw = np.round(policy_epochs * np.linspace(0, 1, count) ** 2).astype(int)
    return sorted({0, 1, *raw.tolist(), policy_epochs})


@dataclass(slots=True, kw_only=True)
class Search(Generic[V]):
    """A search that can be stopped, or killed, at any time, and goes on where it was.

    Attributes:
        problem: what is learned.
        holder: who holds the rows.
        plan: how it goes.
        planted: what is known of the examples.
        directory: where measures and the copy of the rows outlive the process; None: nowhere.
        keeps_rows: whether the copy of the rows does; for a holder that outlives the process too.
        stop: asked after each row but the last of an epoch.
        on_epoch: called after each policy epoch with how many are done and the seconds this one took without measures.
        copies: what keeps the rows of the running epoch.
    """

    problem: Problem[V]
    holder: RowHolder
    plan: SearchPlan
    planted: Planted
    directory: Path | None = None
    keeps_rows: bool = True
    stop: Stop = lambda: False
    on_epoch: Callable[[int, float], None] = lambda epoch, seconds: None
    copies: RowCopy = field(init=False)

    def __post_init__(self) -> None:
        self.copies = RowCopy(self.directory if self.keeps_rows else None)

    def run(self) -> tuple[list[Measures], RunPath[V]]:
        """Runs what is left; returns the measures in the order of their epochs, and the run under the final policy.

        Raises:
            StoppedError: `stop` said so.
            RowsLostError: an epoch was interrupted whose rows are not known any more.
        """
        found: dict[int, Measures] = {}
        while True:
            started = time.monotonic()
            epoch = self.holder.moves() // self.holder.settings.rows
            weights, done = self.copies.take(self.holder)
            path = RunPath.run(self.problem, weights, memory_bytes=self.plan.memory_bytes)
            lost = 0.0
            measures = None
            if epoch in self.plan.measured:
                before = time.monotonic()
                measures = found[epoch] = self._measured(path, epoch)
                lost = time.monotonic() - before
            sims = AdjointSims(path.weights, looked_steps(path.steps, count=self.plan.looks))
            if epoch >= self.holder.settings.policy_epochs:
                for step, contributions in pull_back(path):
                    sims.add(step, contributions)
                found[epoch] = self._complete(measures or self._measured(path, epoch), sims)
                return [found.get(each) or self._load(each) for each in sorted({*self.plan.measured, epoch})], path
            told = sims.add if measures is not None else _nothing
            move_rows(path, self.holder, scale=self.plan.scale(epoch), done=done, stop=self.stop, on_row=told)
            if measures is not None:
                found[epoch] = self._complete(measures, sims)
            self.on_epoch(epoch + 1, time.monotonic() - started - lost)

    def _measured(self, path: RunPath[V], epoch: int) -> Measures:
        file = self._file(epoch)
        if file is not None and file.exists():
            return Measures.load(file)
        test = epoch in self.plan.tested
        result = measure(path, epoch=epoch, planted=self.planted, looks=self.plan.looks, test=test)
        self._save(result)
        return result

    def _complete(self, measures: Measures, sims: "AdjointSims") -> Measures:
        """With what the backward pass told."""
        result = replace(measures, adjoint_sim=sims.values())
        self._save(result)
        return result

    def _save(self, measures: Measures) -> None:
        file = self._file(measures.epoch)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            measures.save(file)

    def _load(self, epoch: int) -> Measures:
        file = self._file(epoch)
        assert file is not None, "without a directory all epochs ran in this process"
        return Measures.load(file)

    def _file(self, epoch: int) -> Path | None:
        return None if self.directory is None else self.directory / f"epoch-{epoch:04d}.npz"


class AdjointSims:
    """SIM_t with the adjoint, collected from a backward pass.

    Args:
        weights: the rows, [T, N].
        looked: [S], steps that are looked at closely.
    """

    def __init__(self, weights: Weights, looked: NDArray[np.int64]) -> None:
        self._weights = weights
        self._found = dict.fromkeys(looked.tolist(), np.nan)

    def add(self, step: int, contributions: Statistics) -> None:
        """The contributions λ_{t+1}·∇l_n of a step, [N]."""
        if step in self._found:
            weights = self._weights[step].astype(np.float64)
            self._found[step] = similarity(contributions.astype(np.float64), weights, floor=0.0)

    def values(self) -> Array:
        """[S]."""
        return np.array(list(self._found.values()))


def _nothing(step: int, contributions: Statistics) -> None:
    """Where nothing is measured."""
