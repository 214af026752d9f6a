"""Servers that share the policies: who loads which, what is handed over, and what is not."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from equipoise_server.engine import Durability, Engine, Wish, memory
from equipoise_server.errors import ServiceError
from equipoise_server.store import EmbeddedRedis, RedisStore, ServerLoad
from tests.server.engine.conftest import Servers
from tests.server.engine.runs import send, spec, steps

HERE, OTHERS = "10.0.0.1:1", ("10.0.0.2:1", "10.0.0.3:1")


@pytest.fixture
async def store(redis: EmbeddedRedis) -> AsyncIterator[RedisStore]:
    connected = RedisStore.connect(redis.url)
    yield connected
    await connected.close()


@pytest.fixture
async def engine(servers: Servers) -> Engine:
    return await servers.make(HERE, instance="here", spreads=True)


async def join(store: RedisStore, address: str, *, free_bytes: int | None = None) -> None:
    """A server without policies says that it is there."""
    await store.heartbeat(address, address=address, load=ServerLoad(policies=0, free_bytes=free_bytes), ttl_s=60)


async def place(engine: Engine, name: str) -> str:
    """Where a policy is served that somebody asks this server for."""
    try:
        await engine.runner(name, wish=Wish.ANYWHERE)
    except ServiceError as error:
        return error.metadata["owner"]
    return HERE


async def settle(engine: Engine) -> None:
    """Returns when nothing is being handed over any more."""
    assert engine._spreading is not None
    await engine._spreading.close()


async def test_policies_that_are_asked_for_at_once_are_shared_evenly(engine: Engine, store: RedisStore) -> None:
    for other in OTHERS:
        await join(store, other)
    names = [f"policy-{number}" for number in range(30)]
    for name in names:
        await engine.create(replace(spec(), name=name))
    places = Counter(await asyncio.gather(*(place(engine, name) for name in names)))
    assert places == dict.fromkeys((HERE, *OTHERS), 10)


async def test_who_asks_for_a_policy_that_is_served_elsewhere_changes_no_share(
    engine: Engine, servers: Servers, store: RedisStore
) -> None:
    await store.heartbeat("owner", address=OTHERS[0], load=ServerLoad(policies=1), ttl_s=60)
    owner = await servers.make(OTHERS[0], instance="owner")
    await engine.create(spec())
    await owner.runner("policy")
    assert {await place(engine, "policy") for _ in range(20)} == {OTHERS[0]}
    await engine.create(replace(spec(), name="next"))
    assert await place(engine, "next") == HERE


async def test_a_policy_is_not_sent_to_a_server_without_room_for_it(
    engine: Engine, store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few that one has: it would refuse it, and whoever asks be sent there again and again."""
    monkeypatch.setattr(memory, "ALWAYS_FITS", 0)
    await join(store, OTHERS[0], free_bytes=0)
    names = [f"policy-{number}" for number in range(5)]
    for name in names:
        await engine.create(replace(spec(), name=name))
        assert await place(engine, name) == HERE
    await engine.balance()
    await settle(engine)
    assert len(engine.runners) == 5
    await join(store, OTHERS[0], free_bytes=1 << 40)
    await engine.balance()
    await settle(engine)
    assert len(engine.runners) == 3


async def test_a_full_server_sends_on_what_another_one_has_room_for(
    engine: Engine, store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "ALWAYS_FITS", 0)
    monkeypatch.setattr("equipoise_server.engine.engine.free_bytes", lambda device: 0)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    await join(store, OTHERS[0], free_bytes=1 << 40)
    for number in range(4):
        with pytest.raises(ServiceError) as caught:
            await engine.create(replace(spec(), name=f"policy-{number}"), wish=Wish.ANYWHERE)
        assert (caught.value.reason, caught.value.metadata) == ("NOT_OWNER", {"owner": OTHERS[0]})


async def test_a_server_whose_device_has_failed_draws_no_policies(
    engine: Engine, store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(device: object) -> int:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("equipoise_server.engine.engine.free_bytes", fail)
    assert engine.load is None
    await join(store, OTHERS[0])
    await engine.create(spec())
    assert await place(engine, "policy") == OTHERS[0]
    await engine.balance()


async def test_a_policy_that_is_being_exported_stays_until_that_is_done(engine: Engine, store: RedisStore) -> None:
    await engine.create(spec())
    await engine.create(replace(spec(), name="another"))
    one, two = await engine.runner("policy"), await engine.runner("another")
    await join(store, OTHERS[0])
    async with one.snapshot(), two.snapshot():
        await engine.balance()
        await settle(engine)
        assert len(engine.runners) == 2
    await engine.balance()
    await settle(engine)
    assert len(engine.runners) == 1


async def test_a_policy_stays_while_the_store_does_not_take_its_steps(
    engine: Engine, store: RedisStore, redis: EmbeddedRedis
) -> None:
    for name in ("policy", "another"):
        await engine.create(spec(name, durability=Durability.BEHIND))
    some = [await engine.runner(name) for name in ("policy", "another")]
    await join(store, OTHERS[0])
    client = RedisStore.connect(redis.url)
    try:
        await client._commands.run("probe", "CONFIG", "SET", "maxmemory", "1")
        for runner in some:
            await send(runner, next(steps(1000)))
        async with asyncio.timeout(60):
            while not all(runner.log.failing for runner in some):
                await asyncio.sleep(0.01)
        await engine.balance()
        await settle(engine)
        assert len(engine.runners) == 2
    finally:
        await client._commands.run("probe", "CONFIG", "SET", "maxmemory", "0")
        await client.close()


async def test_a_policy_that_nobody_uses_can_still_be_seen_after_it_was_handed_over(
    engine: Engine, store: RedisStore
) -> None:
    names = {"policy", "another"}
    for name in names:
        await engine.create(replace(spec(), name=name))
        await engine.runner(name)
    await join(store, OTHERS[0])
    await engine.balance()
    await settle(engine)
    assert len(engine.runners) == 1
    assert {service.policy.name for service in engine.services} == names


async def test_a_server_that_takes_no_more_policies_leaves_the_list_even_if_a_heartbeat_was_under_way(
    store: RedisStore,
) -> None:
    await store.leave_servers(OTHERS[0])
    await join(store, OTHERS[0])
    assert list(await store.servers()) == [OTHERS[0]]
    await store.heartbeat(OTHERS[0], address=OTHERS[0], ttl_s=60)
    assert await store.servers() == {}
