"""Appends have connections of their own: no fault of one reaches the next command, and no answer the wrong caller."""

import asyncio
from pathlib import Path

import pytest
from redis.asyncio import Redis

from equipoise_server.store import RedisStore, Unavailable
from equipoise_server.store.connect import CONNECTIONS
from tests.server.store.conftest import RedisProcess, entries, eventually, logged, policy, running_redis

PATIENT_S = 20.0


async def names_of_connections(admin: Redis) -> set[str]:
    return {client["id"] for client in await admin.client_list()}


async def test_a_stalled_redis_is_given_up_and_its_late_answer_reaches_nobody(
    shared_redis: RedisProcess, admin: Redis
) -> None:
    store = RedisStore.connect(shared_redis.url, command_timeout_s=0.2)
    await store.create(policy())
    owner = await store.acquire("lm", address="a:1")
    await store.append(owner, entries(1, 2))
    with shared_redis.paused(), pytest.raises(Unavailable) as caught:
        await store.append(owner, entries(3, 3))
    assert caught.value.kind == "timeout"
    assert str(caught.value).endswith("no answer in time")
    await store.close()
    store = RedisStore.connect(shared_redis.url, command_timeout_s=PATIENT_S)
    await store.append(owner, entries(1, 5))  # whether the third was applied or not
    assert await logged(store) == entries(1, 5)
    await store.close()


async def test_a_caller_who_leaves_takes_his_answer_with_him(shared_redis: RedisProcess, admin: Redis) -> None:
    store = RedisStore.connect(shared_redis.url, command_timeout_s=PATIENT_S)
    await store.create(policy())
    owner = await store.acquire("lm", address="a:1")
    await store.append(owner, entries(1, 1))
    with shared_redis.paused():
        leaving = asyncio.create_task(store.append(owner, entries(7, 7)))  # a gap, which Redis refuses
        await asyncio.sleep(0)  # it waits for its answer
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
    await store.append(owner, entries(2, 2))
    assert await logged(store) == entries(1, 2)
    await store.close()


async def test_a_redis_that_was_killed_under_an_append_gets_it_again(short_dir: Path) -> None:
    directory = short_dir / "append"
    directory.mkdir()
    keeping = ("--appendonly", "yes", "--appendfsync", "no")
    with running_redis(directory, *keeping) as process:
        store = RedisStore.connect(process.url, command_timeout_s=PATIENT_S)
        await store.create(policy())
        owner = await store.acquire("lm", address="a:1")
        await store.append(owner, entries(1, 3))
        with process.paused():
            asking = asyncio.create_task(store.append(owner, entries(4, 5)))
            await asyncio.sleep(0)
            process.process.kill()
            with pytest.raises(Unavailable) as caught:
                await asking
    assert caught.value.kind in ("disconnected", "refused")
    with running_redis(directory, *keeping):
        await store.append(owner, entries(4, 5))
        assert await logged(store) == entries(1, 5)
    await store.close()


async def test_a_restart_between_two_appends_costs_none(short_dir: Path) -> None:
    directory = short_dir / "between"
    directory.mkdir()
    keeping = ("--appendonly", "yes", "--appendfsync", "no")
    with running_redis(directory, *keeping) as process:
        store = RedisStore.connect(process.url, command_timeout_s=PATIENT_S)
        await store.create(policy())
        owner = await store.acquire("lm", address="a:1")
        await store.append(owner, entries(1, 1))
    with running_redis(directory, *keeping):  # no turn of the event loop since: nobody has noticed
        await store.append(owner, entries(2, 2))
        assert await logged(store) == entries(1, 2)
    await store.close()


async def test_who_refuses_to_write_is_asked_over_a_new_connection_next(
    shared_redis: RedisProcess, admin: Redis
) -> None:
    """As a Sentinel's master of before does: only a new connection leads to the new one."""
    store = RedisStore.connect(shared_redis.url, command_timeout_s=PATIENT_S)
    await store.create(policy())
    owner = await store.acquire("lm", address="a:1")
    before = await names_of_connections(admin)
    await store.append(owner, entries(1, 1))
    (direct,) = await names_of_connections(admin) - before
    await store.append(owner, entries(2, 2))
    assert await names_of_connections(admin) - before == {direct}
    await admin.config_set("min-replicas-to-write", "1")
    try:
        with pytest.raises(Unavailable) as caught:
            await store.append(owner, entries(3, 3))
    finally:
        await admin.config_set("min-replicas-to-write", "0")
    assert caught.value.kind == "replicas"
    await store.append(owner, entries(3, 3))
    assert direct not in await names_of_connections(admin)
    assert await logged(store) == entries(1, 3)
    await store.close()


async def test_many_policies_share_a_few_connections(shared_redis: RedisProcess, admin: Redis) -> None:
    store = RedisStore.connect(shared_redis.url, command_timeout_s=PATIENT_S)
    owners = []
    for number in range(3 * CONNECTIONS):
        await store.create(policy(f"lm-{number}"))
        owners.append(await store.acquire(f"lm-{number}", address="a:1"))
    before = await names_of_connections(admin)
    for version in range(1, 6):
        await asyncio.gather(*(store.append(owner, entries(version, version)) for owner in owners))
    direct = await names_of_connections(admin) - before
    assert 1 <= len(direct) <= CONNECTIONS
    for owner in owners:
        assert await logged(store, owner.policy) == entries(1, 5)
    await store.close()

    async def closed() -> bool:
        return not direct & await names_of_connections(admin)

    await eventually(closed)
