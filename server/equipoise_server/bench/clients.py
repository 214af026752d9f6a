"""The clients that users have."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from itertools import count, cycle, islice

from equipoise import PolicyClient, aio
from equipoise.channel import Server
from equipoise_server.bench.caller import Sent
from equipoise_server.bench.load import Case, Rows

SUBMITTED = 256
"""Most steps that a client submits before it waits for their answers."""
SUBMITTED_BYTES = 32 << 20
"""Most bytes of them: half of what a client keeps, since those before may not be durable yet."""


class AioClients:
    """An `equipoise.aio.PolicyClient` for each trainer."""

    def __init__(self, case: Case, rows: Sequence[Rows], clients: Sequence[aio.PolicyClient]) -> None:
        self._pipelined = case.pipelined
        self._at_once = at_once(rows)
        self._trainers = list(zip(clients, _places(rows), strict=False))

    @classmethod
    async def open(
        cls, stack: AsyncExitStack, case: Case, rows: Sequence[Rows], *, policies: Sequence[tuple[str, Server]]
    ) -> "AioClients":
        """Clients of policies that exist, shared out among them."""
        clients = [
            await stack.enter_async_context(
                aio.PolicyClient(server.address, policy=policy, when_lost="wait", security=server.security)
            )
            for policy, server in islice(cycle(policies), case.trainers)
        ]
        return cls(case, rows, clients)

    async def send(self, seconds: float) -> list[Sent]:
        """See `Caller`."""
        end = time.perf_counter() + seconds
        send = self._submit if self._pipelined else self._step
        return await asyncio.gather(*(send(client, rows, end) for client, rows in self._trainers))

    @staticmethod
    async def _step(client: aio.PolicyClient, rows: Iterator[Rows], end: float) -> Sent:
        taken: list[float] = []
        now = time.perf_counter()
        while now < end or not taken:
            started, given = now, next(rows)
            await client.step(given.ids, **given.statistics)  # type: ignore[arg-type]
            now = time.perf_counter()
            taken.append(now - started)
        return len(taken), taken

    async def _submit(self, client: aio.PolicyClient, rows: Iterator[Rows], end: float) -> Sent:
        sent = 0
        while time.perf_counter() < end or not sent:
            for given in islice(rows, self._at_once):
                client.submit(given.ids, **given.statistics)  # type: ignore[arg-type]
                sent += 1
                if time.perf_counter() >= end:
                    break
            await client.flush()
        return sent, []


class SyncClients:
    """An `equipoise.PolicyClient` for each trainer, in a thread of its own."""

    def __init__(
        self, case: Case, rows: Sequence[Rows], clients: Sequence[PolicyClient], threads: ThreadPoolExecutor
    ) -> None:
        self._pipelined = case.pipelined
        self._at_once = at_once(rows)
        self._trainers = list(zip(clients, _places(rows), strict=False))
        self._threads = threads

    @classmethod
    async def open(
        cls, stack: AsyncExitStack, case: Case, rows: Sequence[Rows], *, policies: Sequence[tuple[str, Server]]
    ) -> "SyncClients":
        """Clients of policies that exist, shared out among them."""
        threads = stack.enter_context(ThreadPoolExecutor(case.trainers))
        clients = [
            stack.enter_context(PolicyClient(server.address, policy=policy, when_lost="wait", security=server.security))
            for policy, server in islice(cycle(policies), case.trainers)
        ]
        return cls(case, rows, clients, threads)

    async def send(self, seconds: float) -> list[Sent]:
        """See `Caller`."""
        end = time.perf_counter() + seconds
        loop = asyncio.get_running_loop()
        send = self._submit if self._pipelined else self._step
        return await asyncio.gather(
            *(loop.run_in_executor(self._threads, send, client, rows, end) for client, rows in self._trainers)
        )

    @staticmethod
    def _step(client: PolicyClient, rows: Iterator[Rows], end: float) -> Sent:
        taken: list[float] = []
        now = time.perf_counter()
        while now < end or not taken:
            started, given = now, next(rows)
            client.step(given.ids, **given.statistics)  # type: ignore[arg-type]
            now = time.perf_counter()
            taken.append(now - started)
        return len(taken), taken

    def _submit(self, client: PolicyClient, rows: Iterator[Rows], end: float) -> Sent:
        sent = 0
        while time.perf_counter() < end or not sent:
            for given in islice(rows, self._at_once):
                client.submit(given.ids, **given.statistics)  # type: ignore[arg-type]
                sent += 1
                if time.perf_counter() >= end:
                    break
            client.flush()
        return sent, []


def _places(rows: Sequence[Rows]) -> Iterator[Iterator[Rows]]:
    """For each trainer the rows over and over, from another place."""
    for place in count():
        yield (rows[(place + step) % len(rows)] for step in count())


def at_once(rows: Sequence[Rows]) -> int:
    """How many steps a client submits before it waits."""
    return max(1, min(SUBMITTED, SUBMITTED_BYTES // rows[0].request(1).ByteSize()))
