"""Who sends the steps: bare stubs, as they also talk to the echo, or the clients that users have."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from itertools import count, islice
from typing import Any, Protocol

import grpc

from equipoise import PolicyClient, aio
from equipoise.v1 import policy_pb2 as pb
from equipoise.v1 import policy_pb2_grpc
from equipoise_server.bench.load import Case, Rows

IN_FLIGHT = 64
"""Steps of a trainer that pipelines."""
SUBMITTED = 256
"""Steps that a client submits before it waits for their answers."""
MESSAGE_OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


class Caller(Protocol):
    """Sends the steps of all trainers of a case to one server."""

    async def send(self, seconds: float) -> tuple[int, list[float]]:
        """Sends for so long, and waits for what is out; how many steps, and seconds of each, where it is known."""
        ...


class Stubs:
    """One stream of bare stubs for each trainer, on one channel."""

    def __init__(self, case: Case, rows: Sequence[Rows], calls: Sequence[Any]) -> None:
        self._pipelined = case.pipelined
        self._trainers = [(call, self._requests(rows, place)) for place, call in enumerate(calls)]

    @classmethod
    async def open(
        cls, stack: AsyncExitStack, case: Case, rows: Sequence[Rows], *, address: str, policy: str | None
    ) -> "Stubs":
        """Streams to a policy of a server; None: to an echo."""
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(address, options=MESSAGE_OPTIONS))
        stub = policy_pb2_grpc.PolicyServiceStub(channel)
        calls = []
        for place in range(case.trainers):
            call = stub.Exchange()
            stack.callback(call.cancel)
            if policy is not None:
                opening = pb.OpenRequest(policy=policy, trainer_id=f"stub-{place}")
                await call.write(pb.ExchangeRequest(open=opening))
                await call.read()
            calls.append(call)
        return cls(case, rows, calls)

    async def send(self, seconds: float) -> tuple[int, list[float]]:
        """See `Caller`."""
        end = time.perf_counter() + seconds
        send = self._pipeline if self._pipelined else self._ping_pong
        taken = await asyncio.gather(*(send(call, requests, end) for call, requests in self._trainers))
        latencies = [each for of_trainer in taken for each in of_trainer]
        return len(latencies), latencies

    @staticmethod
    def _requests(rows: Sequence[Rows], place: int) -> Iterator[pb.ExchangeRequest]:
        made = [each.request(1) for each in rows]
        for sequence in count(1):
            request = made[(place + sequence) % len(made)]
            request.step.sequence = sequence
            yield request

    @staticmethod
    async def _ping_pong(call: Any, requests: Iterator[pb.ExchangeRequest], end: float) -> list[float]:
        taken: list[float] = []
        now = time.perf_counter()
        while now < end or not taken:
            started = now
            await call.write(next(requests))
            _check(await call.read())
            now = time.perf_counter()
            taken.append(now - started)
        return taken

    @staticmethod
    async def _pipeline(call: Any, requests: Iterator[pb.ExchangeRequest], end: float) -> list[float]:
        taken: list[float] = []
        sent: asyncio.Queue[float] = asyncio.Queue()
        room = asyncio.Semaphore(IN_FLIGHT)

        async def write() -> None:
            while time.perf_counter() < end or sent.empty():
                await room.acquire()
                sent.put_nowait(time.perf_counter())
                await call.write(next(requests))
            sent.put_nowait(0.0)

        writing = asyncio.create_task(write())
        while started := await sent.get():
            _check(await call.read())
            taken.append(time.perf_counter() - started)
            room.release()
        await writing
        return taken


class AioClients:
    """An `equipoise.aio.PolicyClient` for each trainer."""

    def __init__(self, case: Case, rows: Sequence[Rows], clients: Sequence[aio.PolicyClient]) -> None:
        self._pipelined = case.pipelined
        self._trainers = list(zip(clients, _places(rows), strict=False))

    @classmethod
    async def open(
        cls, stack: AsyncExitStack, case: Case, rows: Sequence[Rows], *, address: str, policy: str
    ) -> "AioClients":
        """Clients of a policy that exists."""
        clients = [
            await stack.enter_async_context(aio.PolicyClient(address, policy=policy, when_lost="wait"))
            for _ in range(case.trainers)
        ]
        return cls(case, rows, clients)

    async def send(self, seconds: float) -> tuple[int, list[float]]:
        """See `Caller`."""
        end = time.perf_counter() + seconds
        if self._pipelined:
            sent = await asyncio.gather(*(self._submit(client, rows, end) for client, rows in self._trainers))
            return sum(sent), []
        taken = await asyncio.gather(*(self._step(client, rows, end) for client, rows in self._trainers))
        latencies = [each for of_trainer in taken for each in of_trainer]
        return len(latencies), latencies

    @staticmethod
    async def _step(client: aio.PolicyClient, rows: Iterator[Rows], end: float) -> list[float]:
        taken: list[float] = []
        now = time.perf_counter()
        while now < end or not taken:
            started, given = now, next(rows)
            await client.step(given.ids, **given.statistics)  # type: ignore[arg-type]
            now = time.perf_counter()
            taken.append(now - started)
        return taken

    @staticmethod
    async def _submit(client: aio.PolicyClient, rows: Iterator[Rows], end: float) -> int:
        sent = 0
        while time.perf_counter() < end or not sent:
            for given in islice(rows, SUBMITTED):
                client.submit(given.ids, **given.statistics)  # type: ignore[arg-type]
                sent += 1
                if time.perf_counter() >= end:
                    break
            await client.flush()
        return sent


class SyncClients:
    """An `equipoise.PolicyClient` for each trainer, in a thread of its own."""

    def __init__(
        self, case: Case, rows: Sequence[Rows], clients: Sequence[PolicyClient], threads: ThreadPoolExecutor
    ) -> None:
        self._pipelined = case.pipelined
        self._trainers = list(zip(clients, _places(rows), strict=False))
        self._threads = threads

    @classmethod
    async def open(
        cls, stack: AsyncExitStack, case: Case, rows: Sequence[Rows], *, address: str, policy: str
    ) -> "SyncClients":
        """Clients of a policy that exists."""
        threads = stack.enter_context(ThreadPoolExecutor(case.trainers))
        clients = [
            stack.enter_context(PolicyClient(address, policy=policy, when_lost="wait")) for _ in range(case.trainers)
        ]
        return cls(case, rows, clients, threads)

    async def send(self, seconds: float) -> tuple[int, list[float]]:
        """See `Caller`."""
        end = time.perf_counter() + seconds
        loop = asyncio.get_running_loop()
        send = self._submit if self._pipelined else self._step
        taken = await asyncio.gather(
            *(loop.run_in_executor(self._threads, send, client, rows, end) for client, rows in self._trainers)
        )
        latencies = [each for _, of_trainer in taken for each in of_trainer]
        return sum(sent for sent, _ in taken), latencies

    @staticmethod
    def _step(client: PolicyClient, rows: Iterator[Rows], end: float) -> tuple[int, list[float]]:
        taken: list[float] = []
        now = time.perf_counter()
        while now < end or not taken:
            started, given = now, next(rows)
            client.step(given.ids, **given.statistics)  # type: ignore[arg-type]
            now = time.perf_counter()
            taken.append(now - started)
        return len(taken), taken

    @staticmethod
    def _submit(client: PolicyClient, rows: Iterator[Rows], end: float) -> tuple[int, list[float]]:
        sent = 0
        while time.perf_counter() < end or not sent:
            for given in islice(rows, SUBMITTED):
                client.submit(given.ids, **given.statistics)  # type: ignore[arg-type]
                sent += 1
                if time.perf_counter() >= end:
                    break
            client.flush()
        return sent, []


CALLERS: dict[str, type[Stubs] | type[AioClients] | type[SyncClients]] = {
    "stubs": Stubs,
    "aio": AioClients,
    "client": SyncClients,
}
"""By the name of what sends."""


def _places(rows: Sequence[Rows]) -> Iterator[Iterator[Rows]]:
    """For each trainer the rows over and over, from another place."""
    for place in count():
        yield (rows[(place + step) % len(rows)] for step in count())


def _check(answer: Any) -> None:
    """Raises RuntimeError where a step was not applied: what it took would be no step's."""
    if answer is grpc.aio.EOF:
        raise RuntimeError("the server ended the stream")
    if answer.step.HasField("error"):
        raise RuntimeError(f"the server refused a step: {answer.step.error.message}")
