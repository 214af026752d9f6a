"""A policy epoch of the perceptron's search, in this process and through a server; its projection beside cvxpy's.

    python -m tests.benchmarks.search [STEPS [EPOCHS]]

N = 4096, M = 512, T = 2000 unless told otherwise: training forwards, the adjoint backwards, every row fetched, moved,
projected and stored. What is compared takes turns; rows for the projection are those of this very search.
"""

import platform
import statistics
import sys
import time
from collections.abc import Sequence

import cvxpy
import numpy as np
import psutil
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from equipoise.testing import serve
from equipoise_server.bench.projection import by_cvxpy
from equipoise_trainer.offline.adjoint import move_rows, pull_back
from equipoise_trainer.offline.copies import RowCopy
from equipoise_trainer.offline.logistic import LogisticProblem
from equipoise_trainer.offline.path import RunPath
from equipoise_trainer.offline.rows import LocalRows, RowHolder, RowSettings
from equipoise_trainer.offline.served import ServedRows
from equipoise_trainer.offline.simplex import project
from equipoise_trainer.reproduction.studies import LN2, STUDIES
from tests.benchmarks.trajectory import seconds

STEPS, EPOCHS = 2000, 5
SAMPLE, REPEATS = 5, 100


def epoch(problem: LogisticProblem, holder: RowHolder, server: psutil.Process) -> dict[str, float]:
    """Seconds of the parts of one policy epoch, and the CPU seconds of both sides."""
    taken: dict[str, float] = {}
    cpu = [time.process_time(), sum(server.cpu_times()[:2])]
    started = time.perf_counter()
    weights, _ = RowCopy().take(holder)
    taken["fetch"] = time.perf_counter() - started
    middle = time.perf_counter()
    path = RunPath.run(problem, weights)
    taken["forward"] = time.perf_counter() - middle
    taken["backward and moves"] = seconds(lambda: move_rows(path, holder))
    taken["epoch"] = sum(taken.values())
    taken["trainer CPU"] = time.process_time() - cpu[0]
    taken["server CPU"] = sum(server.cpu_times()[:2]) - cpu[1]
    return taken


def projections(problem: LogisticProblem, settings: RowSettings) -> tuple[list[float], list[float], float]:
    """CPU seconds of projections by sorting and by cvxpy, and the largest difference of N·γ, on rows of a search."""
    size = settings.num_examples
    path = RunPath.run(problem, np.ones((settings.rows, size), dtype=np.float32))
    wanted = set(np.linspace(0, settings.rows - 1, SAMPLE).round().astype(int).tolist())
    rows: list[NDArray[np.float64]] = [
        # Ten steps at once, so that some weights become zero.
        1 / size + 10 * settings.learning_rate * contributions.astype(np.float64)
        for step, contributions in pull_back(path)
        if step in wanted
    ]
    ours, theirs, differences = [], [], []
    for row in rows:
        started = time.process_time()
        for _ in range(REPEATS):
            exact = project(row)
        middle = time.process_time()
        solved = by_cvxpy(cvxpy, size * row[None])[0] / size
        ours.append((middle - started) / REPEATS)
        theirs.append(time.process_time() - middle)
        differences.append(size * float(np.abs(solved - exact).max()))
    return ours, theirs, max(differences)


def main(arguments: Sequence[str]) -> None:
    """Runs the benchmark and prints a table."""
    steps, epochs = (*map(int, arguments), *(STEPS, EPOCHS)[len(arguments) :])
    study = STUDIES["paper-512"]
    problem = study.experiment(0).problem
    assert isinstance(problem, LogisticProblem)
    settings = RowSettings(
        num_examples=study.rows.num_examples, rows=steps, policy_epochs=100, learning_rate=study.rows.learning_rate
    )
    taken: dict[str, list[dict[str, float]]] = {"in this process": [], "through a server": []}
    alone = LocalRows(settings)
    with (
        serve() as server,
        ServedRows(server.address, policy="bench", settings=settings, reference_nats=LN2) as served,
    ):
        there = psutil.Process(server.pid)
        for _ in range(epochs):
            taken["in this process"].append(epoch(problem, alone, there))
            taken["through a server"].append(epoch(problem, served, there))
    parts = list(taken["in this process"][0])
    table = Table("rows", *parts, "fastest", title=f"policy epoch, N={problem.num_examples}, T={steps}: median seconds")
    for name, runs in taken.items():
        medians = [f"{statistics.median(run[part] for run in runs):.2f}" for part in parts]
        table.add_row(name, *medians, f"{min(run['epoch'] for run in runs):.2f}")
    Console().print(table)
    ours, theirs, difference = projections(problem, settings)
    ratios = sorted(slow / fast for slow, fast in zip(theirs, ours, strict=True))
    fast, slow = (1e3 * statistics.median(each) for each in (ours, theirs))
    print(f"CPU of a projection {fast:.3f} ms, by cvxpy {slow:.0f} ms: {statistics.median(ratios):.0f} times as much")
    print(f"least {ratios[0]:.0f} times; largest difference of a weight (1 on average) {difference:.1e}")
    print(f"{platform.platform()}, Python {platform.python_version()}, numpy {np.__version__}")


if __name__ == "__main__":
    main(sys.argv[1:])
