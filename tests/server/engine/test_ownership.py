"""Whose a policy is: one server's at a time, and another's once the first stops, dies or is taken for dead."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from time import monotonic

import pytest

from equipoise_server.engine import Engine, Outcome, memory
from equipoise_server.engine.departures import CHECK_S
from equipoise_server.errors import ServiceError, draining
from equipoise_server.store import EmbeddedRedis, RedisStore
from equipoise_server.store.observer import NoObserver
from tests.server.engine.conftest import Servers
from tests.server.engine.runs import send, spec, steps

FIRST, SECOND = "10.0.0.1:1", "10.0.0.2:1"


class Counter(NoObserver):
    """Counts what the store is asked."""

    commands = 0

    def command(self, name: str, seconds: float) -> None:
        """One more."""
        self.commands += 1


@pytest.fixture
async def store(redis: EmbeddedRedis) -> AsyncIterator[RedisStore]:
    connected = RedisStore.connect(redis.url)
    yield connected
    await connected.close()


@pytest.fixture
async def first(servers: Servers, store: RedisStore) -> Engine:
    """Owns the policy and says that it lives."""
    engine = await servers.make(FIRST, instance="first")
    await store.heartbeat("first", address=FIRST, ttl_s=60)
    await engine.create(spec())
    runner = await engine.runner("policy")
    for step, _ in zip(steps(1000), range(5), strict=False):
        await send(runner, step)
    return engine


@pytest.fixture
async def second(servers: Servers) -> Engine:
    return await servers.make(SECOND, instance="second")


async def refusal(engine: Engine) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        await engine.runner("policy")
    return caught.value


async def test_a_server_that_does_not_own_the_policy_names_the_one_that_does(first: Engine, second: Engine) -> None:
    error = await refusal(second)
    assert (error.reason, error.metadata) == ("NOT_OWNER", {"owner": FIRST})
    assert (await send(await first.runner("policy"), next(steps(1000, first=6)))).version == 6  # nothing happened to it


async def test_a_dead_server_s_policies_move_once_its_time_is_up(
    first: Engine, second: Engine, store: RedisStore
) -> None:
    await store.heartbeat("first", address=FIRST, ttl_s=0.3)
    assert (await refusal(second)).reason == "NOT_OWNER"
    async with asyncio.timeout(60):
        while True:
            try:
                runner = await second.runner("policy")
            except ServiceError:
                await asyncio.sleep(0.05)
            else:
                break
    assert (runner.policy.version, runner.epoch) == (5, 2)


async def test_a_server_that_has_no_room_leaves_the_policy_to_one_that_has(
    first: Engine, second: Engine, servers: Servers, store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await first.close(draining(), flush_timeout_s=60)
    await store.heartbeat("second", address=SECOND, ttl_s=60)
    with monkeypatch.context() as full:
        full.setattr(memory, "ALWAYS_FITS", 0)
        full.setattr(memory, "free_bytes", lambda device: 0)
        assert (await refusal(second)).reason == "DEVICE_FULL"
    third = await servers.make("10.0.0.3:1", instance="third")
    assert (await third.runner("policy")).policy.version == 5


async def test_a_server_that_starts_again_at_its_address_takes_its_own_back_at_once(
    first: Engine, servers: Servers
) -> None:
    again = await servers.make(FIRST, instance="first, started again")
    assert (await again.runner("policy")).epoch == 2


async def test_a_stopping_server_hands_over_when_its_last_stream_has_ended(first: Engine, second: Engine) -> None:
    runner = await first.runner("policy")
    asked = asyncio.Event()
    session, _ = await runner.open("trainer")
    session.when_draining(asked.set)
    handing_over = asyncio.create_task(first.hand_over(draining(), flush_timeout_s=60))
    await asyncio.wait_for(asked.wait(), 60)
    last = await send(runner, next(steps(1000, first=6)))
    assert (last.outcome, last.version) == (Outcome.APPLIED, 6)
    assert (await refusal(second)).reason == "NOT_OWNER"
    runner.close_session(session)
    await asyncio.wait_for(handing_over, 60)
    taken = await second.runner("policy")
    assert (taken.policy.version, taken.epoch) == (6, 2)
    assert (await refusal(first)).reason == "DRAINING"


async def test_who_asks_for_what_a_leaving_server_still_has_waits_until_it_is_given_up(
    first: Engine, second: Engine, store: RedisStore
) -> None:
    """Its address would be of no use: it takes nobody any more, and is soon gone."""
    await store.heartbeat("first", address=FIRST, ttl_s=60, leaving=True)
    asking = asyncio.create_task(second.runner("policy", wait_s=60))
    with pytest.raises(ServiceError) as caught:
        await second.runner("policy", wait_s=0.2)
    assert caught.value.reason == "LOADING"
    assert not asking.done()
    await first.hand_over(draining(), flush_timeout_s=20)
    taken = await asyncio.wait_for(asking, 20)
    assert (taken.policy.version, taken.epoch) == (5, 2)


async def test_a_leaving_server_that_dies_is_replaced_once_its_time_is_up(
    first: Engine, second: Engine, store: RedisStore
) -> None:
    await store.heartbeat("first", address=FIRST, ttl_s=0.3, leaving=True)
    assert (await second.runner("policy", wait_s=60)).epoch == 2


async def test_however_many_policies_are_waited_for_the_store_is_asked_as_if_it_were_one(
    servers: Servers, store: RedisStore, redis: EmbeddedRedis
) -> None:
    """Else the waiting takes all connections, and this server's own heartbeats and steps with them."""
    names, counter = [f"policy-{index}" for index in range(100)], Counter()
    first = await servers.make(FIRST, instance="first")
    second = await servers.make(
        SECOND, instance="second", store=RedisStore.connect(redis.url, observer=counter), load_wait_s=60
    )
    await store.heartbeat("first", address=FIRST, ttl_s=600, leaving=True)
    owners = []
    for name in names:
        await first.create(spec(name, num_examples=10))
        owners.append(await store.acquire(name, address=FIRST, instance="first"))
    began = monotonic()
    asking = [asyncio.create_task(second.runner(name)) for name in names]
    while counter.commands < 2 * len(names) or monotonic() < began + 1.0:
        await asyncio.sleep(0.01)
    rounds = (monotonic() - began) / CHECK_S + 1
    assert counter.commands <= 2 * len(names) + 2 * rounds
    for owner in owners:
        await store.release(owner)
    taken = await asyncio.wait_for(asyncio.gather(*asking), 60)
    assert [runner.epoch for runner in taken] == [2] * len(names)


async def test_a_store_that_fails_while_a_leaving_server_is_waited_for_is_what_callers_hear_of(
    first: Engine, second: Engine, store: RedisStore, redis: EmbeddedRedis
) -> None:
    await store.heartbeat("first", address=FIRST, ttl_s=600, leaving=True)
    asking = asyncio.create_task(second.runner("policy", wait_s=60))
    with pytest.raises(ServiceError) as caught:
        await second.runner("policy", wait_s=0.2)
    assert caught.value.reason == "LOADING"
    await redis.stop()
    with pytest.raises(ServiceError) as caught:
        await asyncio.wait_for(asking, 60)
    assert caught.value.reason == "STATE_STORE_DOWN"


async def test_a_policy_that_left_memory_is_free_for_all(first: Engine, second: Engine) -> None:
    await first.unload_idle(idle_s=-1.0)
    assert first.runners == []
    assert (await second.runner("policy")).policy.version == 5


async def test_a_server_that_was_taken_for_dead_turns_trainers_away_at_their_next_opening(
    first: Engine, second: Engine, store: RedisStore
) -> None:
    before = await first.runner("policy")
    session, _ = await before.open("trainer")
    await store.end_heartbeat("first")
    await second.runner("policy")
    with pytest.raises(ServiceError) as caught:
        await before.open("other")
    assert caught.value.reason == "FENCED"
    assert (await asyncio.wait_for(session.ended, 60)).reason == "FENCED"  # and nobody reads old weights from it
    await store.heartbeat("second", address=SECOND, ttl_s=60)
    assert (await refusal(first)).metadata == {"owner": SECOND}


async def test_a_server_that_was_taken_for_dead_verifies_what_it_owns(
    first: Engine, second: Engine, store: RedisStore
) -> None:
    before = await first.runner("policy")
    assert await store.heartbeat("first", address=FIRST, ttl_s=60)
    await store.end_heartbeat("first")
    assert not await store.heartbeat("first", address=FIRST, ttl_s=60)
    await first.check_fences()
    assert before.closed is None  # nobody was asked for it meanwhile
    await store.end_heartbeat("first")
    await second.runner("policy")
    await first.check_fences()
    assert before.closed is not None
    assert before.closed.reason == "FENCED"


async def test_openings_do_not_wait_for_a_redis_that_is_stalled(first: Engine, redis: EmbeddedRedis) -> None:
    runner = await first.runner("policy")
    assert redis.pid is not None
    os.kill(redis.pid, signal.SIGSTOP)
    try:
        _, answer = await asyncio.wait_for(runner.open("trainer"), 60)
    finally:
        os.kill(redis.pid, signal.SIGCONT)
    assert answer.last_sequence == 5


async def test_two_servers_that_find_the_owner_gone_do_not_both_replace_it(
    first: Engine, servers: Servers, store: RedisStore
) -> None:
    await store.end_heartbeat("first")
    others = []
    for number in range(4):
        await store.heartbeat(f"other {number}", address=f"10.0.1.{number}:1", ttl_s=60)
        others.append(await servers.make(f"10.0.1.{number}:1", instance=f"other {number}"))
    found = await asyncio.gather(*(engine.runner("policy") for engine in others), return_exceptions=True)
    refused = [error for error in found if isinstance(error, ServiceError)]
    assert len(refused) == 3
    assert {error.reason for error in refused} == {"NOT_OWNER"}
