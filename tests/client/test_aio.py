"""The asyncio client against a real server on a socket: the logic is the session's, so this tests the transport."""

import asyncio
from dataclasses import replace
from time import monotonic
from typing import Any

import grpc
import pytest

from equipoise import Backoff, Source, Timeout, errors
from equipoise.aio import PolicyAdmin, PolicyClient
from tests.client.scripted_server import REFUSED_STEP, ScriptedServer, refusal, status_of
from tests.patience import PATIENT

HOPEFUL = replace(PATIENT, close=1.0)
"""Waits for answers, and not for ever for a server that is gone."""
QUICK = replace(HOPEFUL, step=0.5)
"""Does not wait long for one that has fallen silent either."""
PROMPT = Backoff(first=0.01, longest=0.05)


def client_of(server: ScriptedServer, **options: Any) -> PolicyClient:
    defaults: dict[str, Any] = {"policy": "run-7", "num_examples": 10, "timeout": HOPEFUL, "backoff": PROMPT}
    return PolicyClient(server.address, **(defaults | options))


async def step(client: PolicyClient, number: int) -> Source:
    return (await client.step([number % 10], losses=[1.0], step=number)).source


def applied(server: ScriptedServer) -> list[int]:
    (steps,) = server.memory.applied.values()
    return steps


async def test_steps_reads_and_submissions(server: ScriptedServer) -> None:
    async with client_of(server) as client:
        assert (await client.step([1, 2], losses=[1.0, 1.0])).weights.tolist() == [2.0, 2.0]
        client.submit([3], losses=[1.0])
        assert await client.flush(60, durable=True)
        assert client.weights([3, 4]).tolist() == [2.0, 1.0]
        assert (await client.read([4])).weights.tolist() == [1.0]
        assert client.stats.applied == 2
    assert server.service.headers == ["run-7"]


async def test_many_steps_at_once_are_answered_each(server: ScriptedServer) -> None:
    async with client_of(server, when_lost="wait") as client:
        results = await asyncio.gather(*(client.step([0], losses=[1.0], step=n) for n in range(200)))
    assert [r.version for r in results] == list(range(1, 201))
    assert applied(server) == list(range(200))


@pytest.mark.parametrize("when_lost", ["continue", "wait"])
async def test_a_server_killed_and_back_has_every_step_once(server: ScriptedServer, when_lost: str) -> None:
    async with client_of(server, when_lost=when_lost) as client:
        await step(client, 0)
        server.kill()
        asyncio.get_running_loop().call_later(0.3, server.start)
        sources = [await step(client, number) for number in range(1, 8)]
        if when_lost == "wait":
            assert set(sources) == {Source.SERVED}
        assert await client.flush(60)
        assert applied(server) == list(range(8))


async def test_a_silent_server_costs_one_deadline(server: ScriptedServer) -> None:
    async with client_of(server, timeout=QUICK) as client:
        await step(client, 1)
        server.service.speaking.clear()
        start = monotonic()
        for number in range(2, 100):
            assert await step(client, number) is not Source.SERVED
        assert 0.5 <= monotonic() - start < 40.0  # 49 s if each waited
        server.service.speaking.set()
        assert await client.flush(60)
        assert applied(server) == list(range(1, 100))


async def test_close_returns_when_the_server_hangs(server: ScriptedServer) -> None:
    client = client_of(server, when_lost="wait")
    await step(client, 1)
    server.service.speaking.clear()
    client.submit([1], losses=[1.0])
    start = monotonic()
    await client.close()
    assert monotonic() - start < 10.0  # timeout.close is 1 s
    with pytest.raises(errors.ClientClosedError):
        await step(client, 2)


async def test_a_server_that_never_answers_the_opening_is_left(server: ScriptedServer) -> None:
    timeout = Timeout(step=0.1, connect=0.2, close=0.5)
    async with client_of(server, timeout=timeout) as client:
        server.service.speaking.clear()
        assert await step(client, 0) is Source.UNIFORM
        await asyncio.to_thread(wait_for_streams, server, 2)
        server.service.speaking.set()
        assert await client.flush(60)
        assert applied(server) == [0]


def wait_for_streams(server: ScriptedServer, count: int) -> None:
    end = monotonic() + 60
    while len(server.service.headers) < count:
        assert monotonic() < end, "no second stream"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (grpc.StatusCode.UNAVAILABLE, "DRAINING"),
        (grpc.StatusCode.CANCELLED, ""),
        (grpc.StatusCode.INTERNAL, "BUG"),
        (grpc.StatusCode.OUT_OF_RANGE, "SEQUENCE_GAP"),
    ],
)
async def test_a_stream_that_ends_is_opened_again(server: ScriptedServer, code: grpc.StatusCode, reason: str) -> None:
    async with client_of(server, when_lost="wait") as client:
        await step(client, 0)
        server.service.end_with, server.service.end_after = (code, status_of(code, reason)), 1
        for number in range(1, 4):
            assert await step(client, number) is Source.SERVED
        assert applied(server) == list(range(4))
        assert client.stats.reconnects == 1


async def test_a_server_that_asks_to_reconnect_loses_nothing(server: ScriptedServer) -> None:
    async with client_of(server) as client:
        server.service.reconnect_after = 3
        for number in range(8):
            assert await step(client, number) is Source.SERVED
        assert (client.stats.reconnects, client.stats.outages) == (1, 0)


async def test_refusals_and_replaced_trainers_raise(server: ScriptedServer) -> None:
    async with client_of(server) as client:
        with pytest.raises(errors.StepRefusedError):
            await step(client, REFUSED_STEP)
        assert await step(client, 1) is Source.SERVED
        code = grpc.StatusCode.ABORTED
        server.service.end_with, server.service.end_after = (code, status_of(code, "TRAINER_REPLACED")), 2
        with pytest.raises(errors.TrainerReplacedError):
            await step(client, 2)


async def test_cancelling_a_step_leaves_the_stream_alone(server: ScriptedServer) -> None:
    async with client_of(server, when_lost="wait") as client:
        await step(client, 0)
        server.service.speaking.clear()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(step(client, 1), 0.05)
        server.service.speaking.set()
        assert await step(client, 2) is Source.SERVED
        assert applied(server) == [0, 1, 2]
        assert client.stats.reconnects == 0


async def test_calls_beside_the_loop(server: ScriptedServer) -> None:
    async with client_of(server) as client, PolicyAdmin(server.address) as admin:
        await step(client, 0)
        assert (await client.status()).version == 1
        assert (await client.server_info()).max_batch_examples == 1000
        assert [p.spec.name async for p in admin.list_policies("x")] == ["x0", "x1", "x2", "x3", "x4", "x5"]
        assert (await client.read_weights()).tolist() == [0, 1, 2, 3, 4, 5]
        await client.preload()
        assert client.weights([5, 2]).tolist() == [5, 2]
        statuses = client.watch()
        assert [(await anext(statuses)).version for _ in range(3)] == [0, 1, 2]
        with pytest.raises(errors.PolicyDeletedError):
            await anext(statuses)
        server.service.fail_with = (grpc.StatusCode.INVALID_ARGUMENT, refusal())
        with pytest.raises(errors.InvalidRequestError) as caught:
            await client.status()
        assert (caught.value.field, caught.value.index) == ("contributions", 1)


async def test_steps_that_need_no_server_leave_the_loop_time_to_find_it() -> None:
    timeout = Timeout(step=0.05, connect=0.05, close=0.1)
    async with PolicyClient("127.0.0.1:1", policy="run-7", num_examples=10, timeout=timeout) as client:
        assert await step(client, 0) is Source.UNIFORM  # the server is known to be lost from here on
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        for number in range(100):
            await step(client, number)
        counting.cancel()
        assert turns >= 50


@pytest.mark.parametrize("use", ["step", "server_info"])
def test_a_client_belongs_to_the_loop_it_was_first_used_in(server: ScriptedServer, use: str) -> None:
    client = client_of(server)

    async def once() -> object:
        return await (client.step([1], losses=[1.0]) if use == "step" else client.server_info())

    assert asyncio.run(once())
    with pytest.raises(errors.EventLoopError, match="a client for each loop"):
        asyncio.run(once())
