"""Bare stubs, as they also talk to the echo."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from itertools import count, cycle, islice
from typing import Any

import grpc

from equipoise.channel import Server
from equipoise.security import Security
from equipoise.v1 import policy_pb2 as pb
from equipoise.v1.policy_pb2_grpc import PolicyServiceStub
from equipoise_server.bench.caller import Sent
from equipoise_server.bench.load import Case, Rows

IN_FLIGHT = 64
"""Steps of a trainer that pipelines."""
MESSAGE_OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


class Stubs:
    """One stream of bare stubs for each trainer, on one channel."""

    def __init__(self, case: Case, rows: Sequence[Rows], calls: Sequence[Any]) -> None:
        self._pipelined = case.pipelined
        self._trainers = [(call, self._requests(rows, place)) for place, call in enumerate(calls)]

    @classmethod
    async def to_echo(cls, stack: AsyncExitStack, case: Case, rows: Sequence[Rows], *, address: str) -> "Stubs":
        """Streams to an echo."""
        channel = await stack.enter_async_context(_channel(Server(address, Security())))
        calls = [PolicyServiceStub(channel).Exchange() for _ in range(case.trainers)]
        for call in calls:
            stack.callback(call.cancel)
        return cls(case, rows, calls)

    @classmethod
    async def open(
        cls, stack: AsyncExitStack, case: Case, rows: Sequence[Rows], *, policies: Sequence[tuple[str, Server]]
    ) -> "Stubs":
        """Streams to policies that exist, shared out among the trainers; one channel for each server."""
        stubs: dict[Server, Any] = {}
        calls = []
        for place, (policy, server) in enumerate(islice(cycle(policies), case.trainers)):
            if server not in stubs:
                stubs[server] = PolicyServiceStub(await stack.enter_async_context(_channel(server)))
            call = stubs[server].Exchange(metadata=server.headers(policy))
            stack.callback(call.cancel)
            opening = pb.OpenRequest(policy=policy, trainer_id=f"stub-{place}")
            await call.write(pb.ExchangeRequest(open=opening))
            await call.read()
            calls.append(call)
        return cls(case, rows, calls)

    async def send(self, seconds: float) -> list[Sent]:
        """See `Caller`."""
        end = time.perf_counter() + seconds
        send = self._pipeline if self._pipelined else self._ping_pong
        taken = await asyncio.gather(*(send(call, requests, end) for call, requests in self._trainers))
        return [(len(each), each) for each in taken]

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


def _channel(server: Server) -> grpc.aio.Channel:
    """As bare as can be; without a bound on messages."""
    credentials = server.security.credentials()
    if credentials is None:
        return grpc.aio.insecure_channel(server.address, options=MESSAGE_OPTIONS)
    return grpc.aio.secure_channel(server.address, credentials, options=MESSAGE_OPTIONS)


def _check(answer: Any) -> None:
    """Raises RuntimeError where a step was not applied: what it took would be no step's."""
    if answer is grpc.aio.EOF:
        raise RuntimeError("the server ended the stream")
    if answer.step.HasField("error"):
        raise RuntimeError(f"the server refused a step: {answer.step.error.message}")
