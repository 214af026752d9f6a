"""Whether small steps notice that the pages of a large policy are written."""

import argparse
import os
import time

import numpy as np
import torch

from equipoise.aio import PolicyClient
from equipoise.testing import ServerProcess, serve
from equipoise_server.bench.load import Case, Rows, make_rows
from equipoise_server.bench.report import Report, digits, progress
from equipoise_server.bench.told import Ended, told
from equipoise_server.rules import build

SMALL_ROWS, LARGE_ROWS = 64, 65536
SMALL_STEPS = 20
"""Between large steps."""
MARGIN = 1.05
"""A sweep is due when the log is as long as the tables: so many times their bytes are logged."""
LONGEST_SWEEP_S = 300.0


def plan(options: argparse.Namespace) -> None:
    """Nothing. Raises ValueError."""
    build(options.rule, {})
    if (least := min(options.examples)) < LARGE_ROWS:
        raise ValueError(f"--examples {least}: must be at least {LARGE_ROWS}, the rows of the steps that fill the log")


async def run(options: argparse.Namespace, plan: None, report: Report) -> None:
    """Measures one sweep for each N."""
    for size in options.examples:
        with serve(log_format="json", sweep_min_bytes=1 << 20) as server:
            steps, ended = await _measure(server, options.rule, size, rest_s=options.seconds)
        _add(report, options.rule, size, steps, ended)
        report.write()
        progress(f"measured: N = {size:,}")


async def _measure(
    server: ServerProcess, rule: str, size: int, *, rest_s: float
) -> tuple[list[tuple[float, float]], list[Ended]]:
    """Small steps, when they ended and how long they took, seconds; and sweeps."""
    small, large = (
        make_rows(Case(rows=rows, trainers=1, pipelined=False, rule=rule), size) for rows in (SMALL_ROWS, LARGE_ROWS)
    )
    steps: list[tuple[float, float]] = []

    async def step(client: PolicyClient) -> None:
        given = small[len(steps) % len(small)]
        started = time.perf_counter()
        await client.step(given.ids, **given.statistics)  # type: ignore[arg-type]
        steps.append((time.time(), time.perf_counter() - started))

    async with PolicyClient(
        server.address, policy="bench", num_examples=size, rule=rule, durability="behind", when_lost="wait"
    ) as client:
        await client.read([0])
        table = build(rule, {}).init(size, device=torch.device("meta")).nbytes
        logged, number = 0, 0
        while logged < MARGIN * table and not list(told(server, "swept")):
            given = _spread(large[number % len(large)], number, size)
            client.submit(given.ids, omit_weights=True, **given.statistics)  # type: ignore[arg-type]
            await client.flush(LONGEST_SWEEP_S)
            logged += sum(values.nbytes for values in (given.ids, *given.statistics.values()))
            number += 1
            for _ in range(SMALL_STEPS):
                await step(client)
        give_up = time.monotonic() + LONGEST_SWEEP_S
        while not (ended := list(told(server, "swept"))) and time.monotonic() < give_up:
            for _ in range(SMALL_STEPS):
                await step(client)
        until = time.monotonic() + rest_s
        while time.monotonic() < until:
            await step(client)
    return steps, ended


def _spread(rows: Rows, number: int, size: int) -> Rows:
    """The same statistics for examples of all pages."""
    return Rows((number + np.arange(LARGE_ROWS) * (size // LARGE_ROWS)) % size, rows.statistics)


def _add(report: Report, rule: str, size: int, steps: list[tuple[float, float]], ended: list[Ended]) -> None:
    def sweeping(at: float) -> bool:
        return any(each.at - each.seconds <= at <= each.at for each in ended)

    load = os.getloadavg()[0]
    for name, chosen in (("a sweep", True), ("none", False)):
        taken = [1e3 * seconds for at, seconds in steps if sweeping(at) == chosen]
        p50, p99, worst = map(float, np.quantile(taken, (0.5, 0.99, 1.0))) if taken else (None, None, None)
        pages, seconds = (ended[0].pages, ended[0].seconds) if chosen and ended else (None, None)
        found = {
            "rule": rule,
            "num_examples": size,
            "during": name,
            "pages": pages,
            "sweep_s": seconds,
            "steps": len(taken),
            "p50_ms": p50,
            "p99_ms": p99,
            "worst_ms": worst,
            "load": load,
        }
        line = {
            "rule": rule,
            "N": f"{size:.3g}",
            "during": name,
            "pages": pages,
            "sweep s": digits(seconds),
            "steps": len(taken),
            "p50 ms": digits(p50),
            "p99 ms": digits(p99),
            "worst ms": digits(worst),
            "load": f"{load:.0f}",
        }
        report.add(found, line)
