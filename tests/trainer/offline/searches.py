"""A small search that several tests share."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise_trainer.datasets import DatasetConfig, load
from equipoise_trainer.offline.logistic import LogisticProblem, Vector
from equipoise_trainer.offline.planted import Planted
from equipoise_trainer.offline.rows import LocalRows, RowHolder, RowSettings
from equipoise_trainer.offline.search import Search, SearchPlan
from equipoise_trainer.tasks import Task

EPOCHS, ROWS, SIZE = 4, 30, 200
PLAN = SearchPlan(measured=(0, 2, EPOCHS), tested=(0, EPOCHS), looks=10)
SETTINGS = RowSettings(num_examples=SIZE, rows=ROWS, policy_epochs=EPOCHS, learning_rate=3e-4)


def small_task() -> Task:
    task = load(DatasetConfig(name="paper", seed=3, flipped=0.2, target_size=50))
    kept: NDArray[np.int64] = np.arange(SIZE)
    test = task.test.take(np.arange(300))
    return replace(task, train=task.train.take(kept), test=test, flipped=task.flipped[:SIZE])


def small_search(directory: Path | None = None, holder: RowHolder | None = None, **options: Any) -> Search[Vector]:
    task = small_task()
    return Search(
        problem=LogisticProblem(task, learning_rate=0.3, dtype=np.float64),
        holder=holder or LocalRows(SETTINGS),
        plan=PLAN,
        planted=Planted.of_flips(task.flipped),
        directory=directory,
        **options,
    )
