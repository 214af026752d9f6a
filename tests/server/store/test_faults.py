import asyncio
import time
from pathlib import Path

import pytest
from redis.asyncio import Redis

from equipoise_server.store import UNAVAILABLE_KINDS, Page, RedisStore, Unavailable
from tests.server.store.conftest import (
    CountingObserver,
    RedisProcess,
    entries,
    logged,
    policy,
    running_redis,
    write_page,
)

TIMEOUT_S = 2.0
"""Far more than an answer takes, on a busy machine too."""


async def kind_of_failure(store: RedisStore) -> str:
    """The kind with which a creation fails, soon."""
    started = time.monotonic()
    with pytest.raises(Unavailable) as caught:
        await store.create(policy())
    # Twice the timeout is promised; the rest is for a busy machine. The library's own patience is a minute.
    assert time.monotonic() - started < 2 * TIMEOUT_S + 5
    assert caught.value.__cause__ is not None
    assert caught.value.kind in UNAVAILABLE_KINDS
    return caught.value.kind


async def test_nobody_there(short_dir: Path, observer: CountingObserver) -> None:
    store = RedisStore.connect(f"unix://{short_dir}/nobody.sock", command_timeout_s=TIMEOUT_S, observer=observer)
    assert await kind_of_failure(store) == "refused"
    assert observer.errors == ["refused"]
    await store.close()
    over_tcp = RedisStore.connect("redis://127.0.0.1:1", command_timeout_s=TIMEOUT_S)
    assert await kind_of_failure(over_tcp) == "refused"
    await over_tcp.close()


async def test_stalled(shared_redis: RedisProcess, admin: Redis) -> None:
    store = RedisStore.connect(shared_redis.url, command_timeout_s=TIMEOUT_S)
    await store.ping()
    with shared_redis.paused():
        assert await kind_of_failure(store) == "timeout"
        # Also where all must open a connection first, and wait for one.
        failures = await asyncio.gather(*(store.ping() for _ in range(20)), return_exceptions=True)
        assert {getattr(failure, "kind", None) for failure in failures} <= {"timeout", "exhausted"}
    await store.ping()
    await store.close()


async def test_full(store: RedisStore, admin: Redis) -> None:
    await store.create(policy("other"))
    owner = await store.acquire("other", address="a:1")
    await store.append(owner, entries(1, 1))
    await admin.config_set("maxmemory", "2mb")
    try:
        with pytest.raises(Unavailable) as caught:
            await write_page(store, owner, 0, Page(version=1, columns={"raw": b"x" * 3_000_000}))
        assert caught.value.kind == "oom"
        await admin.config_set("maxmemory", "500kb")
        with pytest.raises(Unavailable) as caught:
            await store.append(owner, entries(2, 3))
        assert caught.value.kind == "oom"
        assert await kind_of_failure(store) == "oom"
        assert await logged(store, "other") == entries(1, 1)
        assert await store.read_page(owner, 0) is None
    finally:
        await admin.config_set("maxmemory", "0")
    await store.append(owner, entries(2, 3))
    assert await logged(store, "other") == entries(1, 3)


async def test_read_only(store: RedisStore, admin: Redis) -> None:
    await store.create(policy("other"))
    owner = await store.acquire("other", address="a:1")
    await admin.replicaof("127.0.0.1", "1")
    try:
        for write in (store.append(owner, entries(1, 1)), store.create(policy())):
            with pytest.raises(Unavailable) as caught:
                await write
            assert caught.value.kind == "readonly"
    finally:
        await admin.replicaof("NO", "ONE")
    await store.append(owner, entries(1, 1))


async def test_unable_to_persist(store: RedisStore, admin: Redis, short_dir: Path) -> None:
    """A Redis that cannot write its snapshot refuses writes."""
    await admin.config_set("save", "3600 1")
    await admin.set("some", "change")
    in_the_way = short_dir / "dump.rdb"
    in_the_way.unlink(missing_ok=True)
    in_the_way.mkdir()
    try:
        await admin.bgsave()

        async with asyncio.timeout(60):
            while (await admin.info("persistence"))["rdb_last_bgsave_status"] == "ok":
                await asyncio.sleep(0.01)
        assert await kind_of_failure(store) == "misconf"
    finally:
        in_the_way.rmdir()
        await admin.config_set("save", "")
        await admin.save()
    await store.create(policy())


async def test_locked(store: RedisStore, shared_redis: RedisProcess, admin: Redis) -> None:
    await admin.config_set("requirepass", "secret")
    stranger = RedisStore.connect(shared_redis.url, command_timeout_s=TIMEOUT_S)
    try:
        assert await kind_of_failure(stranger) == "auth"
    finally:
        await admin.config_set("requirepass", "")
        await stranger.close()


async def test_restarted(short_dir: Path) -> None:
    """Connections that died while idle cost no command."""
    directory = short_dir / "restarted"
    directory.mkdir()
    with running_redis(directory) as process:
        store = RedisStore.connect(process.url, command_timeout_s=5)
        await asyncio.gather(*(store.ping() for _ in range(8)))
    assert await kind_of_failure(store) in ("refused", "disconnected")
    with running_redis(directory):
        for _ in range(10):
            await store.ping()
        await store.create(policy())
    await store.close()


async def test_killed_between_question_and_answer(short_dir: Path) -> None:
    directory = short_dir / "killed"
    directory.mkdir()
    with running_redis(directory) as process:
        store = RedisStore.connect(process.url, command_timeout_s=60)
        await store.ping()
        with process.paused():
            asking = asyncio.create_task(store.get("lm"))
            await asyncio.sleep(0)
            process.process.kill()
            with pytest.raises(Unavailable) as caught:
                await asking
    assert caught.value.kind in ("disconnected", "refused")
    await store.close()


async def test_a_connection_of_before_a_restart_fails_no_command(short_dir: Path) -> None:
    directory = short_dir / "unnoticed"
    directory.mkdir()
    with running_redis(directory) as process:
        store = RedisStore.connect(process.url)
        await asyncio.gather(*(store.ping() for _ in range(5)))
    with running_redis(directory):  # no turn of the event loop since: nobody has noticed
        await store.create(policy())
        await asyncio.gather(*(store.ping() for _ in range(5)))
    await store.close()
