"""How fast a policy comes back from Redis, beside a reading of the same bytes."""

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.aio import PolicyAdmin, PolicyClient
from equipoise.testing import ServerProcess, serve
from equipoise_server.bench.load import Case, make_rows
from equipoise_server.bench.processes import cpu_seconds
from equipoise_server.bench.report import Report, progress, quartiles
from equipoise_server.bench.result import Ratio
from equipoise_server.bench.told import told
from equipoise_server.rules import build
from equipoise_server.store import EmbeddedRedis
from equipoise_server.store.connect import client_for, close_client
from equipoise_server.store.keys import PolicyKeys

POLICY = "bench"
PAGES, LOG = KINDS = ("pages", "log")
FILLING_ROWS = 65536
LARGE_STEPS = 128
"""At least: the replay of their log takes longer than a stop in order leaves to the next start."""
AT_ONCE = 16
"""Steps that are submitted before their answers are waited for."""
ENTRIES_AT_ONCE = 1000
PATIENCE_S = 600.0
SETTINGS: dict[str, str | int] = {
    "log_format": "json",
    "drain_grace_s": 600,
    "sweep_min_bytes": 1 << 40,
    "max_batch_examples": FILLING_ROWS,
    "policy_idle_s": 3600,
}


@dataclass(frozen=True, slots=True)
class Restored:
    """One restore, and the reading beside it.

    Attributes:
        seconds: of the restore.
        server_s: processor time of the server, seconds; of Redis the same.
        redis_s: see above.
        pages: that were read.
        entries: of the log that were replayed.
        read_s: seconds of the reading.
        read_cpu_s: processor time of this process for it, seconds.
        read_bytes: values that it got, bytes.
    """

    seconds: float
    server_s: float
    redis_s: float
    pages: int
    entries: int
    read_s: float
    read_cpu_s: float
    read_bytes: int


def plan(options: argparse.Namespace) -> Case:
    """What the options ask for. Raises ValueError."""
    build(options.rule, {})
    if (most := options.rows) > min(options.examples):
        raise ValueError(f"--rows {most}: more than --examples {min(options.examples)}; ids of a step are distinct")
    return Case(rows=options.rows, trainers=1, pipelined=True, rule=options.rule)


async def run(options: argparse.Namespace, plan: Case, report: Report) -> None:
    """Measures the restore of pages for each N, then that of a log."""
    for kind in KINDS:
        for size in options.examples if kind == PAGES else options.examples[:1]:
            async with _redis() as redis, _server(redis) as server:
                if kind == PAGES:
                    await _fill(server, plan, size)
                    await asyncio.to_thread(server.stop)
                else:
                    await _log(server, plan, size, entries=options.entries)
                turns = [await _turn(server, redis) for _ in range(options.turns)]
            _add(report, plan, kind, size, turns)
            report.write()
            progress(f"measured: {kind}, N = {size:,}")


@asynccontextmanager
async def _redis() -> AsyncIterator[EmbeddedRedis]:
    with tempfile.TemporaryDirectory(prefix="equipoise-") as folder:
        redis = EmbeddedRedis(Path(folder))
        await redis.start()
        try:
            yield redis
        finally:
            await redis.stop()


@asynccontextmanager
async def _server(redis: EmbeddedRedis) -> AsyncIterator[ServerProcess]:
    with serve(redis_url=redis.url, **SETTINGS) as server:
        yield server
        server.kill()  # what it would still write is of no use


async def _fill(server: ServerProcess, case: Case, size: int) -> None:
    """Scores all examples, in so many large steps that the server writes pages when it stops."""
    whole = make_rows(Case(rows=min(size, FILLING_ROWS), trainers=1, pipelined=True, rule=case.rule), size)
    once = range(0, size, FILLING_ROWS)
    starts = list(once) * -(-LARGE_STEPS // len(once))
    async with _client(server, case, size) as client:
        for number, start in enumerate(starts):
            ids = np.arange(start, min(start + FILLING_ROWS, size))
            given = {name: values[: len(ids)] for name, values in whole[number % len(whole)].statistics.items()}
            client.submit(ids, omit_weights=True, **given)  # type: ignore[arg-type]
            if number % AT_ONCE == AT_ONCE - 1:
                await client.flush(PATIENCE_S)
        await client.flush(PATIENCE_S, durable=True)


async def _log(server: ServerProcess, case: Case, size: int, *, entries: int) -> None:
    """Makes so many steps, and no sweep."""
    rows = make_rows(case, size)
    async with _client(server, case, size) as client:
        for number in range(entries):
            given = rows[number % len(rows)]
            client.submit(given.ids, omit_weights=True, **given.statistics)  # type: ignore[arg-type]
            if number % 256 == 255:
                await client.flush(PATIENCE_S)
        await client.flush(PATIENCE_S, durable=True)


def _client(server: ServerProcess, case: Case, size: int) -> PolicyClient:
    return PolicyClient(
        server.address,
        policy=POLICY,
        num_examples=size,
        rule=case.rule,
        settings=dict(case.settings_for(size)),
        durability="behind",
        when_lost="wait",
    )


async def _turn(server: ServerProcess, redis: EmbeddedRedis) -> Restored:
    await asyncio.to_thread(server.restart)
    read_s, read_cpu_s, read_bytes = await _read(redis.url)
    pid = redis.pid or os.getpid()
    before = cpu_seconds(server.pid), cpu_seconds(pid)
    async with PolicyAdmin(server.address, timeout=PATIENCE_S) as admin:
        await admin.get(POLICY)
    used = cpu_seconds(server.pid) - before[0], cpu_seconds(pid) - before[1]
    *_, last = told(server, "loaded")
    return Restored(last.seconds, *used, last.pages, last.entries, read_s, read_cpu_s, read_bytes)


async def _read(url: str) -> tuple[float, float, int]:
    """Of all values of the policy's pages and log, one command after another: seconds, of the processor, and bytes."""
    client = client_for(url, command_timeout_s=PATIENCE_S)
    ask: Callable[..., Awaitable[Any]] = client.execute_command
    keys, size = PolicyKeys("equipoise", POLICY), 0
    generation = (await ask("HGET", keys.spec, "generation")).decode()
    pages = sorted(map(int, await ask("HKEYS", keys.manifest(generation))))
    started, cpu = time.perf_counter(), time.process_time()
    for page in pages:
        size += sum(map(len, (await ask("HGETALL", keys.page(generation, page))).values()))
    last = "-"
    while found := await ask("XRANGE", keys.log(generation), last, "+", "COUNT", ENTRIES_AT_ONCE):
        size += sum(len(value) for _, fields in found for value in fields.values())
        last = f"({found[-1][0].decode()}"
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    await close_client(client)
    return seconds, cpu, size


def _add(report: Report, case: Case, kind: str, size: int, turns: Sequence[Restored]) -> None:
    ratio = Ratio.of([each.read_s / each.seconds for each in turns])
    median = {name: float(np.median([getattr(each, name) for each in turns])) for name in asdict(turns[0])}
    entries = turns[-1].entries
    entries_per_s = entries / median["seconds"] if kind == LOG else None
    load = os.getloadavg()[0]
    found = {
        "from": kind,
        "rule": case.rule,
        "num_examples": size,
        "rows": case.rows if kind == LOG else None,
        **median,
        "bytes_per_s": median["read_bytes"] / median["seconds"],
        "entries_per_s": entries_per_s,
        "ratio": asdict(ratio),
        "load": load,
        "turns": [asdict(each) for each in turns],
    }
    line = {
        "from": kind,
        "rule": case.rule,
        "N": f"{size:.3g}",
        "pages": turns[-1].pages,
        "entries": entries,
        "MB": f"{median['read_bytes'] / 1e6:,.1f}",
        "restore s": f"{median['seconds']:.3g}",
        "MB/s": f"{median['read_bytes'] / median['seconds'] / 1e6:,.0f}",
        "read s": f"{median['read_s']:.3g}",
        "read CPU s": f"{median['read_cpu_s']:.3g}",
        "ratio": quartiles(ratio.median, ratio.low, ratio.high),
        "entries/s": f"{entries_per_s:,.0f}" if entries_per_s else None,
        "server s": f"{median['server_s']:.3g}",
        "redis s": f"{median['redis_s']:.3g}",
        "load": f"{load:.0f}",
    }
    report.add(found, line)
