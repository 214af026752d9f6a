"""Appends have connections of their own: no fault of one reaches the next command, and no answer the wrong caller."""

import asyncio
from pathlib import Path

import pytest
from redis.asyncio import Redis

from equipoise_server.store import LogEntry, RedisStore, Unavailable
from equipoise_server.store.connect import CONNECTIONS, client_for, close_client, direct_connections
from equipoise_server.store.log import LARGE_WAIT_S
from tests.e2e.faults.proxy import At, FaultProxy
from tests.ports import free_port
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


async def test_a_slow_line_is_no_silence(short_dir: Path) -> None:
    """A step of megabytes takes longer than an answer may, and would never be durable."""
    directory, port, timeout_s, size = short_dir / "slow", free_port(), 3.0, 40 << 20
    directory.mkdir()
    with (
        running_redis(directory, "--port", str(port), "--bind", "127.0.0.1"),
        FaultProxy(("127.0.0.1", port)) as proxy,
    ):
        store = RedisStore.connect(f"redis://{proxy.address}", command_timeout_s=timeout_s)
        await store.create(policy())
        owner = await store.acquire("lm", address="a:1")
        await store.append(owner, entries(1, 1))
        proxy.bytes_per_s = size / (2 * timeout_s)
        await store.append(owner, entries(2, 2, size=size))
        proxy.bytes_per_s = None
        assert (await store.log_state("lm")).last_version == 2
        await store.close()


async def test_a_store_that_is_closed_keeps_no_connection_that_is_in_use(
    shared_redis: RedisProcess, admin: Redis
) -> None:
    before = await names_of_connections(admin)
    store = RedisStore.connect(shared_redis.url, command_timeout_s=PATIENT_S)
    await store.create(policy())
    owner = await store.acquire("lm", address="a:1")
    await store.append(owner, entries(1, 1))
    with shared_redis.paused():
        asking = asyncio.create_task(store.append(owner, entries(2, 2)))
        opening = asyncio.create_task(store.append(owner, entries(2, 2)))
        await asyncio.sleep(0)
        await store.close()
    with pytest.raises(Unavailable):
        await asking
    await asyncio.wait([opening])
    with pytest.raises(Unavailable):
        await store.append(owner, entries(2, 2))

    async def closed() -> bool:
        return await names_of_connections(admin) == before

    await eventually(closed)


async def test_no_append_goes_to_a_master_of_before_once_sentinel_names_another(short_dir: Path) -> None:
    """It may live on, apart from its replicas: what it is given is lost."""
    old_port, new_port, guard_port = free_port(), free_port(), free_port()
    directories = [short_dir / name for name in ("old", "new", "guard")]
    for directory in directories:
        directory.mkdir()
    config = directories[2] / "sentinel.conf"
    config.write_text(f"sentinel monitor main 127.0.0.1 {old_port} 1\n")
    loopback = ("--bind", "127.0.0.1")
    ports = (("CONFIG", "GET", "port"),)
    with (
        running_redis(directories[0], "--port", str(old_port), *loopback) as old,
        running_redis(directories[1], "--port", str(new_port), *loopback),
        running_redis(directories[2], "--port", str(guard_port), *loopback, "--sentinel", config=config) as guard,
    ):
        client = client_for(f"redis+sentinel://127.0.0.1:{guard_port}/main", command_timeout_s=PATIENT_S)
        direct = direct_connections(client, timeout_s=PATIENT_S)
        assert direct is not None

        async def masters() -> set[int]:
            """Whom two connections ask."""
            answers = await asyncio.gather(*(direct.execute(ports) for _ in range(2)))
            return {int(answer[0][1]) for answer in answers}

        assert await masters() == {old_port}
        sentinel, former = (Redis.from_url(process.url, protocol=2) for process in (guard, old))
        await sentinel.execute_command("SENTINEL", "REMOVE", "main")
        await sentinel.execute_command("SENTINEL", "MONITOR", "main", "127.0.0.1", str(new_port), "1")
        killed = next(found for found in await former.client_list() if found["cmd"].startswith("config"))
        await former.client_kill_filter(_id=killed["id"])
        await masters()  # one of the two learns of the new one
        assert await masters() == {new_port}
        await direct.close()
        await close_client(client)
        for each in (sentinel, former):
            await each.aclose()


async def test_large_appends_that_take_long_leave_connections_to_small_ones(short_dir: Path) -> None:
    directory, port = short_dir / "hogs", free_port()
    directory.mkdir()
    with (
        running_redis(directory, "--port", str(port), "--bind", "127.0.0.1"),
        FaultProxy(("127.0.0.1", port)) as proxy,
    ):
        store = RedisStore.connect(f"redis://{proxy.address}", command_timeout_s=PATIENT_S)
        owners = []
        for number in range(CONNECTIONS + 1):
            await store.create(policy(f"lm-{number}"))
            owners.append(await store.acquire(f"lm-{number}", address="a:1"))
        *large, small = owners
        with proxy.trap(b"LARGE", At.REQUEST):
            hogs = [
                asyncio.create_task(store.append(owner, [LogEntry(version=1, fields={"LARGE": bytes(1 << 19)})]))
                for owner in large
            ]
            await asyncio.wait(hogs, timeout=3 * LARGE_WAIT_S)  # each has waited for another
            await store.append(small, entries(1, 1))
        await asyncio.gather(*hogs)
        await store.close()
