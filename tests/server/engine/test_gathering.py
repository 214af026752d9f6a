"""Steps that follow each other quickly share a call on the device; one that comes alone waits for none."""

import asyncio
from itertools import islice

import pytest

from equipoise_server.engine import Answer, Durability, NoTelemetry, PolicyRunner, applier
from equipoise_server.engine.applier import INLINE_STEPS, MAX_SKIPPED, QUIET_TURNS
from tests.server.engine.conftest import Servers
from tests.server.engine.runs import spec, steps


@pytest.fixture(autouse=True)
def time_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is: what bounds a call here is how many steps there are."""
    monkeypatch.setattr(applier, "INLINE_S", 60.0)
    monkeypatch.setattr(applier, "CALL_S", 60.0)


class Calls(NoTelemetry):
    """How many steps each call on the device had."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def batch(self, *, steps: int) -> None:
        self.sizes.append(steps)


async def behind(servers: Servers) -> tuple[PolicyRunner, Calls]:
    """A policy whose answers do not wait for the store, which has nothing to do."""
    calls = Calls()
    engine = await servers.make(telemetry=calls)
    of = spec(durability=Durability.BEHIND)
    await engine.create(of)
    runner = await engine.runner(of.name)
    await asyncio.sleep(0.0)
    return runner, calls


async def turns_until(answer: "asyncio.Future[Answer]") -> int:
    """Of the event loop until a step is answered."""
    turns = 0
    while not answer.done():
        await asyncio.sleep(0)
        turns += 1
    return turns


async def test_steps_that_come_one_after_another_are_applied_together_and_in_order(servers: Servers) -> None:
    runner, calls = await behind(servers)
    answers = []
    for step in islice(steps(runner.policy.spec.num_examples, batch=8), 8):
        answers.append(await runner.submit(step))
        await asyncio.sleep(0)  # two turns, as gRPC needs to bring the next
        await asyncio.sleep(0)
    versions = [answer.version for answer in await asyncio.gather(*answers)]
    assert versions == list(range(1, 9))
    assert calls.sizes == [8]


async def test_no_more_are_waited_for_than_one_call_takes(servers: Servers) -> None:
    runner, calls = await behind(servers)
    answers = []
    for step in islice(steps(runner.policy.spec.num_examples, batch=8), INLINE_STEPS + 4):
        answers.append(await runner.submit(step))
        await asyncio.sleep(0)
    await asyncio.gather(*answers)
    assert calls.sizes[0] == INLINE_STEPS
    assert sum(calls.sizes) == INLINE_STEPS + 4


async def test_who_has_one_step_in_flight_waits_for_others_ever_more_seldom(servers: Servers) -> None:
    runner, calls = await behind(servers)
    count = 4 * (MAX_SKIPPED + 1)
    turns = [
        await turns_until(await runner.submit(step))
        for step in islice(steps(runner.policy.spec.num_examples, batch=8), count)
    ]
    assert calls.sizes == [1] * count
    straight = min(turns)
    held_up = [place for place, each in enumerate(turns) if each >= straight + QUIET_TURNS]
    assert held_up[:6] == [0, 2, 6, 14, 30, 62]
    assert len(held_up) <= 6 + count // (MAX_SKIPPED + 1)


async def test_after_steps_that_came_alone_those_that_come_together_are_found_again(servers: Servers) -> None:
    runner, calls = await behind(servers)
    numbered = steps(runner.policy.spec.num_examples, batch=8)
    for step in islice(numbered, 40):
        await (await runner.submit(step))
    answers = []
    for step in islice(numbered, 2 * MAX_SKIPPED):
        answers.append(await runner.submit(step))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    await asyncio.gather(*answers)
    assert calls.sizes[:40] == [1] * 40
    assert max(calls.sizes) == INLINE_STEPS
