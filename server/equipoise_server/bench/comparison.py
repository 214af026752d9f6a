"""One case: whoever is compared takes turns in short blocks, so that a noisy machine disturbs all alike."""

import json
import os
import statistics
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from equipoise.aio import PolicyAdmin
from equipoise.policies import PolicySpec
from equipoise.testing import ServerProcess
from equipoise_server.bench.callers import CALLERS, Caller, Stubs
from equipoise_server.bench.load import Case, make_rows
from equipoise_server.bench.processes import cpu_seconds, resident_bytes
from equipoise_server.bench.reverb import ReverbClients, ReverbServer

ECHO = "echo"
WARM_UP_TURNS = 2
CREATION_S = 600
"""Longest creation of a policy: one of 10^9 examples takes its time."""


@dataclass(frozen=True, slots=True)
class Block:
    """What a contender did in one turn.

    Attributes:
        steps: answered.
        wall_s: time that they took together.
        latencies_s: of each step, from its sending to its answer; empty where it is not known.
        server_s: processor time of the server; of Redis and of this process, which sends, the same.
        redis_s: see above.
        client_s: see above.
    """

    steps: int
    wall_s: float
    latencies_s: Sequence[float]
    server_s: float
    redis_s: float
    client_s: float

    @property
    def p50_s(self) -> float:
        """Median of the latencies."""
        return statistics.median(self.latencies_s)


@dataclass(slots=True)
class Contender:
    """One of those that are compared.

    Attributes:
        name: `echo`, or the durability.
        via: what sends, of `CALLERS`.
        caller: it.
        pid: of the server.
        redis_pid: of its Redis; 0: it has none.
        client_pid: of the process that sends.
        blocks: what it did, turn by turn.
        resident: bytes of the server's memory at the end.
    """

    name: str
    via: str
    caller: Caller
    pid: int
    redis_pid: int = 0
    client_pid: int = field(default_factory=os.getpid)
    blocks: list[Block] = field(default_factory=list)
    resident: int = 0

    async def take_turn(self, seconds: float) -> Block:
        """Sends for so long."""
        before, started = self._used(), time.perf_counter()
        steps, latencies = await self.caller.send(seconds)
        wall = time.perf_counter() - started
        server, redis, client = (now - then for now, then in zip(self._used(), before, strict=True))
        self.resident = resident_bytes(self.pid)
        return Block(steps, wall, latencies, server, redis, client)

    def _used(self) -> tuple[float, float, float]:
        redis = cpu_seconds(self.redis_pid) if self.redis_pid else 0.0
        return cpu_seconds(self.pid), redis, cpu_seconds(self.client_pid)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of a contender in a case.

    Attributes:
        case: the case.
        contender: `echo`, `logged`, `behind` or `reverb`.
        via: what sent.
        steps: how many.
        p50_ms: of a step, from its sending to its answer; None where clients do not tell.
        p99_ms: the same.
        steps_per_s: over all trainers.
        examples_per_s: rows that were applied.
        latency_ratio: median over the turns of p50 over the echo's; None where steps are pipelined and p50 tells how
            long the queue is.
        rate_ratio: median over the turns of steps per second over the echo's.
        server_us: processor time of the server per step, microseconds; of Redis and of who sends the same.
        redis_us: see above.
        client_us: see above.
        server_cpu_s_per_million: processor time of the server per million examples, seconds.
        resident_mb: memory of the server at the end, 10^6 bytes.
        bound: what takes most of the time.
    """

    case: Case
    contender: str
    via: str
    steps: int
    p50_ms: float | None
    p99_ms: float | None
    steps_per_s: float
    examples_per_s: float
    latency_ratio: float | None
    rate_ratio: float
    server_us: float
    redis_us: float
    client_us: float
    server_cpu_s_per_million: float
    resident_mb: float
    bound: str

    def as_json(self) -> dict[str, Any]:
        """As it is written to a file."""
        return asdict(self)


async def compare(
    case: Case,
    server: ServerProcess,
    *,
    echo: tuple[str, int],
    reverb: ReverbServer | None = None,
    durabilities: Sequence[str],
    via: Sequence[str],
    turns: int,
    seconds: float,
) -> list[Result]:
    """The results of the echo, of each durability through each caller, and of Reverb.

    Args:
        case: what is sent.
        server: a policy server with a Redis of its own.
        echo: address and process id.
        reverb: what else to compare with.
        durabilities: of `logged` and `behind`: a policy for each.
        via: names of callers.
        turns: blocks of each contender that count.
        seconds: length of a block.
    """
    rows = make_rows(case)
    redis_pid = json.loads((server.data_dir / "equipoise.lock").read_text())["redis_pid"]
    address, pid = echo
    async with AsyncExitStack() as stack:
        caller = await Stubs.open(stack, case, rows, address=address, policy=None)
        contenders = [Contender(ECHO, "stubs", caller, pid)]
        admin = await stack.enter_async_context(PolicyAdmin(server.address, timeout=CREATION_S))
        for durability in durabilities:
            for each in via:
                policy = f"bench-{durability}-{each}"
                await admin.create(_spec(case, policy, durability))
                stack.push_async_callback(admin.delete, policy)
                sender = await CALLERS[each].open(stack, case, rows, address=server.address, policy=policy)
                contenders.append(Contender(durability, each, sender, server.pid, redis_pid))
        if reverb is not None:
            peer = await ReverbClients.open(stack, case, reverb)
            contenders.append(Contender("reverb", "client", peer, reverb.pid, client_pid=peer.pid))
        for turn in range(WARM_UP_TURNS + turns):
            first = turn % len(contenders)  # whoever goes first in a turn must not do so in all of them
            for contender in contenders[first:] + contenders[:first]:
                block = await contender.take_turn(seconds)
                if turn >= WARM_UP_TURNS:
                    contender.blocks.append(block)
    return [_result(case, contender, contenders[0]) for contender in contenders]


def _spec(case: Case, name: str, durability: str) -> PolicySpec:
    return PolicySpec(
        name=name,
        num_examples=case.num_examples,
        rule=case.rule,
        settings=dict(case.settings),
        durability=durability,  # type: ignore[arg-type]  # the parser has checked it
    )


def _result(case: Case, contender: Contender, echo: Contender) -> Result:
    blocks = contender.blocks
    steps, wall = sum(each.steps for each in blocks), sum(each.wall_s for each in blocks)
    latencies = [each for block in blocks for each in block.latencies_s]
    pairs = list(zip(blocks, echo.blocks, strict=True))
    used = {
        "server": sum(each.server_s for each in blocks),
        "redis": sum(each.redis_s for each in blocks),
        "client": sum(each.client_s for each in blocks),
    }
    return Result(
        case=case,
        contender=contender.name,
        via=contender.via,
        steps=steps,
        p50_ms=1e3 * statistics.median(latencies) if latencies else None,
        p99_ms=1e3 * float(np.quantile(latencies, 0.99)) if latencies else None,
        steps_per_s=steps / wall,
        examples_per_s=steps * case.rows / wall,
        latency_ratio=None if case.pipelined else statistics.median(mine.p50_s / other.p50_s for mine, other in pairs),
        rate_ratio=statistics.median(
            (mine.steps / mine.wall_s) / (other.steps / other.wall_s) for mine, other in pairs
        ),
        server_us=1e6 * used["server"] / steps,
        redis_us=1e6 * used["redis"] / steps,
        client_us=1e6 * used["client"] / steps,
        server_cpu_s_per_million=1e6 * used["server"] / (steps * case.rows),
        resident_mb=contender.resident / 1e6,
        bound=_bound(used, wall),
    )


def _bound(used: dict[str, float], wall: float) -> str:
    """The process that works for most of the time, or waiting: for a turn of a core, a wake-up, the network."""
    shares = {name: seconds / wall for name, seconds in used.items()}
    shares["waiting"] = max(0.0, 1.0 - sum(shares.values()))
    name = max(shares, key=shares.__getitem__)
    return f"{name} {shares[name]:.0%}"
