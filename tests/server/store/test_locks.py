import asyncio

import pytest
from redis.asyncio import Redis

from equipoise_server.store import RedisStore, Unavailable
from tests.server.store.conftest import RedisProcess


async def test_one_server_at_a_time(shared_redis: RedisProcess, store: RedisStore) -> None:
    others = [RedisStore.connect(shared_redis.url, command_timeout_s=5) for _ in range(3)]
    inside = most = entered = 0

    async def enter(server: RedisStore) -> None:
        nonlocal inside, most, entered
        for _ in range(5):
            async with server.lock("quota:red", lease_s=60, wait_s=60):
                inside += 1
                most = max(most, inside)
                await server.ping()
                inside -= 1
                entered += 1

    await asyncio.gather(*(enter(server) for server in (store, *others)))
    assert (most, entered) == (1, 20)
    for server in others:
        await server.close()


async def test_turns_of_other_names_are_not_waited_for_and_none_is_left_behind(store: RedisStore, admin: Redis) -> None:
    async with store.lock("a", lease_s=60, wait_s=0), store.lock("b", lease_s=60, wait_s=0):
        assert await admin.exists("equipoise:lock:a", "equipoise:lock:b") == 2
    with pytest.raises(ZeroDivisionError):
        async with store.lock("a", lease_s=60, wait_s=0):
            raise ZeroDivisionError
    assert await admin.keys("equipoise:lock:*") == []


async def test_a_turn_that_is_not_given_back_ends_by_itself(store: RedisStore) -> None:
    dead = store.lock("a", lease_s=4.0, wait_s=0)  # time enough to find it taken
    await dead.__aenter__()
    with pytest.raises(Unavailable, match="'a': other servers were busy with it for 0 s") as caught:
        async with store.lock("a", lease_s=60, wait_s=0):
            pass
    assert caught.value.kind == "busy"
    async with store.lock("a", lease_s=60, wait_s=60):
        await dead.__aexit__(None, None, None)  # it is late, and another's turn is not its own
        with pytest.raises(Unavailable):
            async with store.lock("a", lease_s=60, wait_s=0):
                pass


async def test_without_redis_it_is_nobodys_turn(shared_redis: RedisProcess, admin: Redis) -> None:
    store = RedisStore.connect(shared_redis.url, command_timeout_s=0.2)
    with shared_redis.paused(), pytest.raises(Unavailable) as caught:
        async with store.lock("a", lease_s=60, wait_s=60):
            pass
    assert caught.value.kind == "timeout"
    await store.close()
