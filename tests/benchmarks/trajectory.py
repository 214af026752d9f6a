"""A policy epoch of rule `trajectory` through the socket: all rows read, all contributions sent; and its projection.

    python -m tests.benchmarks.trajectory [ROWS [EXAMPLES]]

The trainer is trivial: its contributions are ready beforehand, so that what is measured is the service and the client.
Beside it the same policy epoch in process, and the projection of a sample of the same rows, by the rule and, if it is
installed, by cvxpy, as the paper's code does it.
"""

import platform
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from equipoise import Limits, PolicyClient
from equipoise.testing import serve
from equipoise_server.rules import aggregate, build, project_simplex

ROWS, EXAMPLES = 2000, 4096
EPOCHS = 5
RANGE_ROWS = 64
SAMPLE = 5
LIMITS = Limits(window_bytes=1 << 30, window_steps=1 << 16)

Rows = NDArray[np.float32]


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def settings(rows: int, examples: int) -> dict[str, float]:
    """Settings under which a fair share of the weights becomes zero."""
    return {"rows": rows, "learning_rate": 0.3 / examples, "policy_epochs": 20}


def contributions(rows: int, examples: int) -> Rows:
    """One policy epoch's, [rows, examples]."""
    return np.random.default_rng(0).standard_normal((rows, examples), dtype=np.float32)


class Trainer:
    """Reads all rows, then sends all contributions backward, in ranges and in the stream."""

    def __init__(self, client: PolicyClient, given: Rows) -> None:
        self._client = client
        self._given = given
        self.longest_submit = 0.0

    def read(self) -> None:
        """The forward pass: all rows, some at a time."""
        for first in range(0, len(self._given), RANGE_ROWS):
            self._client.read_weights(rows=range(first, min(first + RANGE_ROWS, len(self._given))))

    def send(self) -> None:
        """The backward pass, until every step is answered."""
        for row in reversed(range(len(self._given))):
            taken = seconds(lambda row=row: self._submit(row))  # type: ignore[misc]
            self.longest_submit = max(self.longest_submit, taken)
        assert self._client.flush(300)

    def settle(self) -> None:
        """Until every step is in the store."""
        assert self._client.flush(300, durable=True)

    def _submit(self, row: int) -> None:
        self._client.submit(all_examples=True, contributions=self._given[row], step=row, omit_weights=True)


def in_process(given: Rows) -> list[float]:
    """Seconds of each policy epoch of the rule alone."""
    rows, examples = given.shape
    rule = build("trajectory", settings(rows, examples))
    state = rule.init(examples, device=torch.device("cpu"))

    def epoch() -> None:
        rule.trajectory_weights(state, slice(0, rows), None)
        for row in reversed(range(rows)):
            rule.update(state, aggregate(contributions=given[row], trajectory_row=row))

    return [seconds(epoch) for _ in range(EPOCHS)]


def over_the_socket(address: str, given: Rows, durability: str) -> tuple[dict[str, list[float]], float]:
    """Seconds of each part of each policy epoch, and the longest submit."""
    rows, examples = given.shape
    parts: dict[str, list[float]] = {}
    with PolicyClient(
        address,
        policy=f"bench-{durability}",
        num_examples=examples,
        rule="trajectory",
        settings=settings(rows, examples),
        durability=durability,  # type: ignore[arg-type]
        when_lost="wait",
        limits=LIMITS,
    ) as client:
        trainer = Trainer(client, given)
        client.read(step=0)
        for _ in range(EPOCHS):
            for name, call in (("read", trainer.read), ("send", trainer.send), ("settle", trainer.settle)):
                parts.setdefault(name, []).append(seconds(call))
    parts["epoch"] = [read + send for read, send in zip(parts["read"], parts["send"], strict=True)]
    return parts, trainer.longest_submit


def by_cvxpy() -> Callable[[NDArray[np.float64]], NDArray[np.float64]] | None:
    """The projection as the paper's code has it, or None."""
    try:
        import cvxpy
    except ImportError:
        return None

    def project(values: NDArray[np.float64]) -> NDArray[np.float64]:
        weights = cvxpy.Variable(len(values))
        problem = cvxpy.Problem(
            cvxpy.Minimize(cvxpy.sum_squares(weights - values)), [weights >= 0, cvxpy.sum(weights) == 1]
        )
        problem.solve()
        return np.asarray(weights.value)

    return project


def projections(given: Rows) -> tuple[float, float | None, float | None]:
    """Median seconds of one projection, by the rule and by cvxpy, and their largest difference in served weights."""
    size = given.shape[1]
    sample = [1.0 + 0.3 * row.astype(np.float64) for row in given[:SAMPLE]]
    ours = statistics.median(seconds(lambda v=v: project_simplex(v)) for _ in range(100) for v in sample)  # type: ignore[misc]
    theirs = by_cvxpy()
    if theirs is None:
        return ours, None, None
    taken, differences = [], []
    for values in sample:
        started = time.perf_counter()
        weights = theirs(values / size)
        taken.append(time.perf_counter() - started)
        differences.append(float(np.abs(size * weights - project_simplex(values)).max()))
    return ours, statistics.median(taken), max(differences)


def main(arguments: list[str]) -> None:
    """Runs the benchmark and prints a table."""
    rows, examples = (*map(int, arguments), *(ROWS, EXAMPLES)[len(arguments) :])
    given = contributions(rows, examples)
    alone = statistics.median(in_process(given))
    table = Table("where", "read s", "send s", "epoch s", "then durable s", "epoch / in process", "longest submit ms")
    table.title = f"one policy epoch, T={rows}, N={examples}: medians of {EPOCHS}"
    table.add_row("in process", "", "", f"{alone:.2f}", "", "1.0", "")
    with serve() as server:
        for durability in ("logged", "behind"):
            parts, longest = over_the_socket(server.address, given, durability)
            read, send, settle, epoch = (statistics.median(parts[name]) for name in ("read", "send", "settle", "epoch"))
            figures = (f"{each:.2f}" for each in (read, send, epoch, settle))
            table.add_row(durability, *figures, f"{epoch / alone:.1f}", f"{1e3 * longest:.1f}")
    Console().print(table)
    ours, theirs, difference = projections(given)
    print(f"projection of a row: {1e3 * ours:.3f} ms", end="; ")
    if theirs is None:
        print("cvxpy is not installed")
    else:
        print(f"by cvxpy {1e3 * theirs:.1f} ms, {theirs / ours:.0f} times as long; largest difference {difference:.1e}")
    print(
        f"{platform.platform()}, Python {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
