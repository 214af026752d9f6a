"""What a scrape of `/metrics` costs, by number of policies."""

import argparse
import asyncio
import os
import time
import urllib.request

import numpy as np

from equipoise.aio import PolicyAdmin, PolicyClient
from equipoise.policies import PolicySpec
from equipoise.testing import ServerProcess, serve
from equipoise_server.bench.processes import cpu_seconds
from equipoise_server.bench.report import Report, progress

NUM_EXAMPLES = 64
REST_S = 1.0
"""What the creation of policies has left behind is over then."""


def plan(options: argparse.Namespace) -> list[int]:
    """Numbers of policies, growing."""
    return sorted(options.policies)


async def run(options: argparse.Namespace, plan: list[int], report: Report) -> None:
    """Measures one server with more and more policies."""
    with serve(policy_idle_s=3600) as server:
        there = 0
        for count in plan:
            await _fill(server, there, count)
            there = count
            _scraped(server)
            await asyncio.sleep(REST_S)
            _measure(server, count, options.turns, report)
            report.write()
            progress(f"measured: {count} policies")


async def _fill(server: ServerProcess, first: int, count: int) -> None:
    """Makes policies number `first` to `count`, each with a step that tells all that a policy can show."""
    ids, ones = range(NUM_EXAMPLES), np.ones(NUM_EXAMPLES, np.float32)
    async with PolicyAdmin(server.address) as admin:
        for number in range(first, count):
            name = f"policy-{number:04d}"
            await admin.create(PolicySpec(name=name, num_examples=NUM_EXAMPLES, reference_nats=2.0))
            async with PolicyClient(server.address, policy=name, when_lost="wait") as client:
                await client.step(ids, contributions=ones, target_loss=1.0, guard_loss=1.0)


def _measure(server: ServerProcess, count: int, turns: int, report: Report) -> None:
    waits: list[float] = []
    before, started = cpu_seconds(server.pid), time.perf_counter()
    for _ in range(turns):
        begun = time.perf_counter()
        text = _scraped(server)
        waits.append(1e3 * (time.perf_counter() - begun))
    busy, seconds = cpu_seconds(server.pid) - before, time.perf_counter() - started
    before = cpu_seconds(server.pid)
    time.sleep(seconds)
    rest = cpu_seconds(server.pid) - before
    p50, p99 = (float(each) for each in np.quantile(waits, (0.5, 0.99)))
    series = sum(not line.startswith("#") for line in text.splitlines())
    processor, load = 1e3 * (busy - rest) / turns, os.getloadavg()[0]
    found = {
        "policies": count,
        "series": series,
        "p50_ms": p50,
        "p99_ms": p99,
        "processor_ms": processor,
        "rest_ms": 1e3 * rest / turns,
        "load": load,
    }
    line = {
        "policies": count,
        "series": series,
        "p50 ms": f"{p50:.3g}",
        "p99 ms": f"{p99:.3g}",
        "processor ms": f"{processor:.3g}",
        "load": f"{load:.0f}",
    }
    report.add(found, line)


def _scraped(server: ServerProcess) -> str:
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics") as page:
        return str(page.read().decode())
