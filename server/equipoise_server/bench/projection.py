"""The exact projection of rows onto the simplex beside a sort in torch and cvxpy."""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from equipoise_server.bench.report import Report, progress, quartiles
from equipoise_server.bench.result import Ratio
from equipoise_server.rules import project_simplex
from equipoise_server.rules.simplex import MAX_EXAMPLES

BLOCK = 64
"""Rows that are projected in a turn: torch sorts them at once."""
MOVE = 0.3
"""How far a contribution of 1 moves a weight, served weights being 1 on average: some become zero."""
OURS, SORT, CVXPY = "ours", "torch sort", "cvxpy"

Rows = NDArray[np.float64]


def plan(options: argparse.Namespace) -> None:
    """Nothing. Raises ValueError."""
    if options.examples > MAX_EXAMPLES:
        raise ValueError(f"--examples {options.examples}: rule trajectory projects at most {MAX_EXAMPLES} examples")


async def run(options: argparse.Namespace, plan: None, report: Report) -> None:
    """Projects all rows, a block at a time."""
    random = np.random.default_rng(0)
    methods: dict[str, Callable[[Rows], Rows]] = {OURS: _ours, SORT: by_sorting}
    try:
        methods[CVXPY] = _with_cvxpy()
    except ImportError as error:
        report.not_run[CVXPY] = str(error)
    taken: dict[str, list[tuple[int, float, float, float]]] = {name: [] for name in methods}
    for first in range(0, options.rows, BLOCK):
        values = 1.0 + MOVE * random.standard_normal((min(BLOCK, options.rows - first), options.examples))
        exact = _ours(values)
        order = list(methods.items())
        turn = first // BLOCK
        for name, project in order[turn % len(order) :] + order[: turn % len(order)]:
            left = options.cvxpy_rows - len(taken[name]) if name == CVXPY else len(values)
            given = values[: min(left, 1)] if name == CVXPY else values
            if not len(given):
                continue
            cpu, wall = time.process_time(), time.perf_counter()
            found = project(given)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            difference = float(np.abs(found - exact[: len(given)]).max())
            taken[name].append((len(given), cpu / len(given), wall / len(given), difference))
    for name, each in taken.items():
        _add(report, options, name, each, taken[OURS])
    progress(f"measured: {options.rows} rows of {options.examples}")


def by_sorting(values: Rows) -> Rows:
    """The nearest w >= 0 with mean 1 to each row, by sorting it (Held, Wolfe, Crowder 1974); float64 [R, n]."""
    given = torch.from_numpy(values)
    size = given.shape[1]
    ordered = given.sort(dim=1, descending=True).values
    excess = ordered.cumsum(1) - size
    counts = torch.arange(1, size + 1, dtype=torch.float64)
    support = (ordered * counts > excess).sum(1, keepdim=True)
    threshold = excess.gather(1, support - 1) / support
    return np.asarray((given - threshold).clamp_(min=0).numpy())


def by_cvxpy(cvxpy: Any, values: Rows) -> Rows:
    """The same for γ = w / n as the paper's code has it: a quadratic programme for each row."""
    size = values.shape[1]
    found = []
    for row in values:
        weights = cvxpy.Variable(size)
        objective = cvxpy.Minimize(cvxpy.sum_squares(weights - row / size))
        cvxpy.Problem(objective, [weights >= 0, cvxpy.sum(weights) == 1]).solve()
        found.append(size * np.asarray(weights.value))
    return np.stack(found)


def _with_cvxpy() -> Callable[[Rows], Rows]:
    cvxpy = import_module("cvxpy")

    return lambda values: by_cvxpy(cvxpy, values)


def _ours(values: Rows) -> Rows:
    return np.stack([project_simplex(row) for row in values])


def _add(
    report: Report,
    options: argparse.Namespace,
    name: str,
    taken: list[tuple[int, float, float, float]],
    ours: list[tuple[int, float, float, float]],
) -> None:
    rows, load = sum(each[0] for each in taken), os.getloadavg()[0]
    cpu, wall = (float(np.median([each[place] for each in taken])) for place in (1, 2))
    ratio = Ratio.of([each[1] / mine[1] for each, mine in zip(taken, ours, strict=False)])
    found = {
        "method": name,
        "rows": rows,
        "num_examples": options.examples,
        "cpu_ms_per_row": 1e3 * cpu,
        "wall_ms_per_row": 1e3 * wall,
        "wall_s": sum(each[0] * each[2] for each in taken),
        "times_ours": asdict(ratio),
        "largest_difference": max(each[3] for each in taken),
        "load": load,
    }
    line = {
        "method": name,
        "rows": rows,
        "N": options.examples,
        "ms/row": f"{1e3 * cpu:.3g}",
        "wall ms": f"{1e3 * wall:.3g}",
        "all rows, s": f"{found['wall_s']:.3g}",
        "/ours": quartiles(ratio.median, ratio.low, ratio.high),
        "difference": f"{found['largest_difference']:.1e}",
        "load": f"{load:.0f}",
    }
    report.add(found, line)
