"""A stream between a scripted transport and a real engine: what refuses a step, what ends the stream, what is sent."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from equipoise.v1 import policy_pb2 as pb
from equipoise_server.engine import Engine, NoTelemetry
from equipoise_server.errors import Code, ServiceError, draining
from equipoise_server.messages import MessageKind, Pace, Received
from equipoise_server.rules import build
from equipoise_server.security.caller import ANYBODY, calling
from equipoise_server.servicer import exchange, sketches
from equipoise_server.servicer.exchange import Exchange
from equipoise_server.servicer.in_flight import InFlightBytes
from equipoise_server.servicer.limits import ServiceLimits
from equipoise_server.servicer.lookups import Lookups
from tests.server.engine.conftest import Servers
from tests.server.engine.runs import spec
from tests.server.servicer.conftest import LIMITS

KIND = MessageKind("ExchangeRequest", pb.ExchangeRequest.FromString, 0)


class Wire:
    """The transport of one stream."""

    def __init__(self) -> None:
        self.requests: asyncio.Queue[object] = asyncio.Queue()
        self.responses: asyncio.Queue[pb.ExchangeResponse] = asyncio.Queue()

    async def read(self) -> object:
        return await self.requests.get()

    async def write(self, message: pb.ExchangeResponse) -> None:
        self.responses.put_nowait(message)

    def send(self, step: pb.StepRequest) -> None:
        self.put(pb.ExchangeRequest(step=step))

    def put(self, request: pb.ExchangeRequest) -> None:
        self.requests.put_nowait(Received(request.SerializeToString(), KIND, Pace(), ""))

    async def receive(self) -> pb.StepResponse:
        return (await asyncio.wait_for(self.responses.get(), 60)).step


@asynccontextmanager
async def stream(
    engine: Engine,
    trainer_id: str = "trainer",
    *,
    wire: Wire | None = None,
    limits: ServiceLimits = LIMITS,
    in_flight: InFlightBytes | None = None,
) -> AsyncIterator[tuple[Wire, "asyncio.Task[None]"]]:
    wire = wire or Wire()
    wire.put(pb.ExchangeRequest(open=pb.OpenRequest(policy="policy", trainer_id=trainer_id)))
    with calling(ANYBODY):
        in_flight = in_flight or InFlightBytes(max_bytes=1 << 30, max_share_bytes=1 << 30)
        exchange = Exchange(Lookups(engine), wire, limits=limits, in_flight=in_flight, telemetry=NoTelemetry())
        serving = asyncio.create_task(exchange.serve(header_policy=None))
    try:
        opened = await asyncio.wait_for(wire.responses.get(), 60)
        assert opened.WhichOneof("message") == "opened"
        yield wire, serving
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


@pytest.fixture
async def engine(servers: Servers) -> Engine:
    made = await servers.make()
    await made.create(spec(num_examples=1000))
    return made


def step(sequence: int, **fields: Any) -> pb.StepRequest:
    ids = np.array([1, 2], "<u8").tobytes()
    given = fields or {"contributions": np.array([1.0, -1.0], "<f4").tobytes()}
    return pb.StepRequest(sequence=sequence, example_ids=ids, **given)


def sketched(sequence: int) -> pb.StepRequest:
    return step(
        sequence, gradient_sketches=np.ones(8, "<f4").tobytes(), target_sketch=np.ones(4, "<f4").tobytes()
    )  # fmt: skip


async def test_a_device_that_fails_refuses_no_step(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    with monkeypatch.context() as fault:
        fault.setattr(sketches, "sketched_contributions", fail)
        async with stream(engine) as (wire, serving):
            wire.send(sketched(1))
            with pytest.raises(ServiceError) as caught:
                await asyncio.wait_for(serving, 60)
    assert (caught.value.code, caught.value.reason) == (Code.UNAVAILABLE, "DEVICE_LOST")
    async with stream(engine) as (wire, _):
        wire.send(sketched(1))
        assert (await wire.receive()).outcome == pb.OUTCOME_APPLIED


async def test_a_bug_in_reading_a_request_ends_its_stream_and_nothing_else(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise ValueError("injected")

    async with stream(engine, "other") as (other, _):
        with monkeypatch.context() as bug:
            bug.setattr(exchange, "convert_step", fail)
            async with stream(engine) as (wire, serving):
                wire.send(step(1))
                with pytest.raises(ValueError, match="injected"):
                    await asyncio.wait_for(serving, 60)
        other.send(step(1))
        assert (await other.receive()).outcome == pb.OUTCOME_APPLIED


async def test_answers_that_are_ready_are_sent_before_the_stream_ends(engine: Engine) -> None:
    runner = await engine.runner("policy")
    async with stream(engine) as (wire, serving):
        for sequence in range(1, 6):
            wire.send(step(sequence))
        while runner.policy.version < 5:
            await asyncio.sleep(0)
        await engine.close(draining(), flush_timeout_s=60)
        with pytest.raises(ServiceError) as caught:
            await asyncio.wait_for(serving, 60)
        assert caught.value.reason == "DRAINING"
        answered = [wire.responses.get_nowait().step for _ in range(wire.responses.qsize())]
    assert [(answer.sequence, answer.durable_sequence) for answer in answered][-1] == (5, 5)
    assert [answer.outcome for answer in answered] == [pb.OUTCOME_APPLIED] * 5


async def test_no_stream_opens_at_a_policy_that_is_being_handed_over(engine: Engine) -> None:
    runner = await engine.runner("policy")
    async with stream(engine) as (wire, serving):
        handing_over = asyncio.create_task(engine.hand_over(draining(), flush_timeout_s=60))
        asked = await asyncio.wait_for(wire.responses.get(), 60)
        assert asked.WhichOneof("message") == "reconnect"
        with pytest.raises(ServiceError) as caught:
            await runner.open("late")
        assert caught.value.reason == "DRAINING"
        wire.send(step(1))  # those that are open are served until they leave
        assert (await wire.receive()).outcome == pb.OUTCOME_APPLIED
        wire.requests.put_nowait(grpc.aio.EOF)
        await asyncio.wait_for(serving, 60)
    await asyncio.wait_for(handing_over, 60)


async def test_a_step_that_its_rule_refuses_is_refused_again_also_after_a_restart(
    servers: Servers, engine: Engine
) -> None:
    await engine.delete("policy")
    await engine.create(spec(num_examples=4, rule="rho"))
    for restarted in (False, True):
        async with stream(await servers.make() if restarted else engine) as (wire, _):
            for again in (restarted, True):
                wire.send(step(1))  # no losses, which the rule needs: it can tell before the queue
                answer = await wire.receive()
                assert (answer.outcome, answer.version) == (pb.OUTCOME_REFUSED, 1), again
                assert answer.error.message


class Unread(Wire):
    """A transport whose client reads the opening's answer, and nothing more."""

    async def write(self, message: pb.ExchangeResponse) -> None:
        if message.WhichOneof("message") == "step":
            await asyncio.Event().wait()
        await super().write(message)


def wide_step(sequence: int, rows: int) -> pb.StepRequest:
    ids, statistics = np.arange(rows, dtype="<u8"), np.ones(rows, "<f4")
    return pb.StepRequest(sequence=sequence, example_ids=ids.tobytes(), contributions=statistics.tobytes())


async def test_who_does_not_read_keeps_nobody_of_his_share_waiting_and_his_stream_ends(servers: Servers) -> None:
    engine, rows = await servers.make(), exchange.MAX_UNREAD_BYTES // 8
    await engine.create(spec(num_examples=rows))
    gate = InFlightBytes(max_bytes=1 << 30, max_share_bytes=40 * rows)
    limits = replace(LIMITS, write_timeout_s=1.0)
    async with stream(engine, wire=Unread(), limits=limits, in_flight=gate) as (unread, serving):
        for sequence in range(1, 9):
            unread.send(wide_step(sequence, rows))
        async with stream(engine, "other", in_flight=gate) as (wire, _):
            for sequence in range(1, 4):
                wire.send(wide_step(sequence, rows))
                assert (await wire.receive()).outcome == pb.OUTCOME_APPLIED
        with pytest.raises(ServiceError, match="no answer was read for 1 s") as caught:
            await asyncio.wait_for(serving, 60)
        assert caught.value.reason == "NOT_READ"


async def test_a_mean_over_a_trajectory_is_not_taken_on_the_event_loop(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, rows = await servers.make(), 500
    settings = dict(build("trajectory", {"rows": rows, "learning_rate": 0.1}).settings)
    await engine.create(replace(spec(num_examples=100), rule="trajectory", settings=settings))
    runner = await engine.runner("policy")
    threads, answer = [], type(runner.policy.rule).answer

    def spied(*arguments: Any) -> Any:
        threads.append(threading.current_thread())
        return answer(*arguments)

    monkeypatch.setattr(type(runner.policy.rule), "answer", spied)
    async with stream(engine) as (wire, _):
        wire.send(pb.StepRequest(sequence=1, target_loss=1.0, weights_for=np.arange(100, dtype="<u8").tobytes()))
        assert len((await wire.receive()).weights) == 400
    assert [thread.name for thread in threads] == ["device-long"]
