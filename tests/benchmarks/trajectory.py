"""A policy epoch of rule `trajectory` through the socket: all rows read, all contributions sent.

    python -m tests.benchmarks.trajectory [ROWS [EXAMPLES]]

The trainer is trivial: its contributions are ready beforehand, so that what is measured is the service and the client.
Beside it the same policy epoch in process; `equipoise bench projection` has the projection alone. CPU seconds are those
of the trainer's and the server's process (Redis apart): on a busy machine they say what the wall clock cannot.
"""

import platform
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from equipoise import PolicyClient
from equipoise.testing import ServerProcess, serve
from equipoise_server.rules import aggregate, build

ROWS, EXAMPLES = 2000, 4096
EPOCHS = 5
RANGE_ROWS = 64
MOVE = 0.3
"""How far a first step moves a weight, served weights being 1 on average, for a contribution of 1."""

Rows = NDArray[np.float32]


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def settings(rows: int, examples: int) -> dict[str, float]:
    """Settings under which a fair share of the weights becomes zero."""
    return {"rows": rows, "learning_rate": MOVE / examples, "policy_epochs": 20}


def contributions(rows: int, examples: int) -> Rows:
    """One policy epoch's, [rows, examples]."""
    return np.random.default_rng(0).standard_normal((rows, examples), dtype=np.float32)


class Trainer:
    """Reads all rows, then sends all contributions backward, in ranges and in the stream."""

    def __init__(self, client: PolicyClient, given: Rows) -> None:
        self._client = client
        self._given = given
        self.submits: list[float] = []
        """Seconds that each submit took."""

    def read(self) -> None:
        """The forward pass: all rows, some at a time."""
        for first in range(0, len(self._given), RANGE_ROWS):
            self._client.read_weights(rows=range(first, min(first + RANGE_ROWS, len(self._given))))

    def send(self) -> None:
        """The backward pass, until every step is answered."""
        for row in reversed(range(len(self._given))):
            self.submits.append(seconds(lambda row=row: self._submit(row)))  # type: ignore[misc]
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


def over_the_socket(server: ServerProcess, given: Rows, durability: str) -> dict[str, float]:
    """Medians over the policy epochs, seconds: its parts and the CPU of both sides; and quantiles of the submits."""
    rows, examples = given.shape
    taken: dict[str, list[float]] = {}
    there = psutil.Process(server.pid)
    with PolicyClient(
        server.address,
        policy=f"bench-{durability}",
        num_examples=examples,
        rule="trajectory",
        settings=settings(rows, examples),
        durability=durability,  # type: ignore[arg-type]
        when_lost="wait",
    ) as client:
        trainer = Trainer(client, given)
        client.read(step=0)
        for _ in range(EPOCHS):
            cpu = [time.process_time(), sum(there.cpu_times()[:2])]
            for name, call in (("read", trainer.read), ("send", trainer.send)):
                taken.setdefault(name, []).append(seconds(call))
            taken.setdefault("trainer cpu", []).append(time.process_time() - cpu[0])
            taken.setdefault("server cpu", []).append(sum(there.cpu_times()[:2]) - cpu[1])
            taken.setdefault("settle", []).append(seconds(trainer.settle))
    taken["epoch"] = [read + send for read, send in zip(taken["read"], taken["send"], strict=True)]
    quantiles = {f"submit p{q}": float(np.quantile(trainer.submits, q / 100)) for q in (50, 99)}
    return {name: statistics.median(values) for name, values in taken.items()} | quantiles


def main(arguments: list[str]) -> None:
    """Runs the benchmark and prints a table."""
    rows, examples = (*map(int, arguments), *(ROWS, EXAMPLES)[len(arguments) :])
    given = contributions(rows, examples)
    alone = statistics.median(in_process(given))
    heads = ("where", "read", "send", "epoch", "then durable", "trainer CPU", "server CPU", "/ in process")
    table = Table(
        *heads, "submit p50 ms", "p99 ms", title=f"one policy epoch, T={rows}, N={examples}: medians, seconds"
    )
    table.add_row("in process", "", "", f"{alone:.2f}", "", "", "", "1.0", "", "")
    parts = ("read", "send", "epoch", "settle", "trainer cpu", "server cpu")
    with serve() as server:
        for durability in ("logged", "behind"):
            took = over_the_socket(server, given, durability)
            figures = [f"{took[name]:.2f}" for name in parts] + [f"{took['epoch'] / alone:.1f}"]
            table.add_row(durability, *figures, *(f"{1e3 * took[f'submit p{q}']:.2f}" for q in (50, 99)))
    Console().print(table)
    print(
        f"{platform.platform()}, Python {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
