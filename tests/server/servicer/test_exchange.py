"""A stream between a scripted transport and a real engine: what refuses a step, what ends the stream, what is sent."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from equipoise.v1 import policy_pb2 as pb
from equipoise_server.engine import Engine, NoTelemetry
from equipoise_server.errors import Code, ServiceError, draining
from equipoise_server.security.caller import ANYBODY, calling
from equipoise_server.servicer import exchange, sketches
from equipoise_server.servicer.exchange import Exchange
from tests.server.engine.conftest import Servers
from tests.server.engine.runs import spec
from tests.server.servicer.conftest import LIMITS


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
        self.requests.put_nowait(pb.ExchangeRequest(step=step))

    async def receive(self) -> pb.StepResponse:
        return (await asyncio.wait_for(self.responses.get(), 20)).step


@asynccontextmanager
async def stream(engine: Engine, trainer_id: str = "trainer") -> AsyncIterator[tuple[Wire, "asyncio.Task[None]"]]:
    wire = Wire()
    wire.requests.put_nowait(pb.ExchangeRequest(open=pb.OpenRequest(policy="policy", trainer_id=trainer_id)))
    with calling(ANYBODY):
        serving = asyncio.create_task(
            Exchange(engine, wire, limits=LIMITS, telemetry=NoTelemetry()).serve(header_policy=None)
        )
    try:
        opened = await asyncio.wait_for(wire.responses.get(), 20)
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
                await asyncio.wait_for(serving, 20)
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
                    await asyncio.wait_for(serving, 20)
        other.send(step(1))
        assert (await other.receive()).outcome == pb.OUTCOME_APPLIED


async def test_answers_that_are_ready_are_sent_before_the_stream_ends(engine: Engine) -> None:
    runner = await engine.runner("policy")
    async with stream(engine) as (wire, serving):
        for sequence in range(1, 6):
            wire.send(step(sequence))
        while runner.policy.version < 5:
            await asyncio.sleep(0)
        await engine.close(draining(), flush_timeout_s=20)
        with pytest.raises(ServiceError) as caught:
            await asyncio.wait_for(serving, 20)
        assert caught.value.reason == "DRAINING"
        answered = [wire.responses.get_nowait().step for _ in range(wire.responses.qsize())]
    assert [(answer.sequence, answer.durable_sequence) for answer in answered][-1] == (5, 5)
    assert [answer.outcome for answer in answered] == [pb.OUTCOME_APPLIED] * 5


async def test_no_stream_opens_at_a_policy_that_is_being_handed_over(engine: Engine) -> None:
    runner = await engine.runner("policy")
    async with stream(engine) as (wire, serving):
        handing_over = asyncio.create_task(engine.hand_over(draining(), flush_timeout_s=20))
        asked = await asyncio.wait_for(wire.responses.get(), 20)
        assert asked.WhichOneof("message") == "reconnect"
        with pytest.raises(ServiceError) as caught:
            await runner.open("late")
        assert caught.value.reason == "DRAINING"
        wire.send(step(1))  # those that are open are served until they leave
        assert (await wire.receive()).outcome == pb.OUTCOME_APPLIED
        wire.requests.put_nowait(grpc.aio.EOF)
        await asyncio.wait_for(serving, 20)
    await asyncio.wait_for(handing_over, 20)


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
