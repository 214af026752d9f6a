from pathlib import Path

import pytest
from redis.asyncio import Redis

from equipoise_server.store import (
    MAX_APPEND_BYTES,
    Fenced,
    LogEntry,
    LogLost,
    Ownership,
    RedisStore,
    Unavailable,
    entry_bytes,
)
from tests.server.store.conftest import RedisProcess, entries, eventually, logged, policy, running_redis


@pytest.fixture
async def owner(store: RedisStore) -> Ownership:
    await store.create(policy())
    return await store.acquire("lm", address="a:1")


async def test_entries_come_back_as_they_went(store: RedisStore, owner: Ownership) -> None:
    refused = LogEntry(version=2, fields={})
    odd = LogEntry(version=3, fields={"ids": bytes(range(256)), "step": b"", "ünïcode": b"1"})
    await store.append(owner, [*entries(1, 1), refused, odd])
    assert await logged(store) == [*entries(1, 1), refused, odd]
    assert await logged(store, after=2) == [odd]
    assert await logged(store, after=3) == []
    assert await logged(store, after=99) == []


async def test_appending_the_same_again_changes_nothing(store: RedisStore, owner: Ownership) -> None:
    await store.append(owner, entries(1, 5))
    await store.append(owner, entries(1, 5))
    await store.append(owner, entries(2, 3))
    assert await logged(store) == entries(1, 5)


async def test_a_batch_that_overlaps_adds_only_its_rest(store: RedisStore, owner: Ownership) -> None:
    await store.append(owner, entries(1, 5))
    await store.append(owner, entries(4, 8))
    assert await logged(store) == entries(1, 8)


async def test_a_gap_is_refused_with_the_last_version(store: RedisStore, owner: Ownership) -> None:
    await store.append(owner, entries(1, 2))
    with pytest.raises(LogLost) as caught:
        await store.append(owner, entries(4, 5))
    assert caught.value.last_version == 2
    with pytest.raises(ValueError, match="version 9 follows 3"):
        await store.append(owner, [*entries(3, 3), *entries(9, 9)])
    assert await logged(store) == entries(1, 2)


async def test_an_append_that_timed_out_but_was_applied_can_be_repeated(
    store: RedisStore, owner: Ownership, shared_redis: RedisProcess
) -> None:
    hasty = RedisStore.connect(shared_redis.url, command_timeout_s=2.0)
    await hasty.append(owner, entries(1, 1))
    with shared_redis.paused():
        with pytest.raises(Unavailable) as caught:
            await hasty.append(owner, entries(2, 3))
        assert caught.value.kind == "timeout"

    async def applied() -> bool:
        return (await store.log_state("lm")).last_version == 3

    await eventually(applied)
    await hasty.append(owner, entries(2, 4))
    assert await logged(store) == entries(1, 4)
    await hasty.close()


async def test_a_flushed_redis_is_noticed(store: RedisStore, owner: Ownership, admin: Redis) -> None:
    await store.append(owner, entries(1, 2))
    await admin.flushall()
    for write in (store.append(owner, entries(3, 3)), store.trim(owner, through_version=1)):
        with pytest.raises(LogLost) as caught:
            await write
        assert caught.value.last_version is None
    assert await admin.keys() == []


async def test_a_lost_log_is_noticed_even_where_the_owner_survived(
    store: RedisStore, owner: Ownership, admin: Redis
) -> None:
    await store.append(owner, entries(1, 2))
    await admin.delete("equipoise:{lm}:u1:log")
    with pytest.raises(LogLost) as caught:
        await store.append(owner, entries(3, 3))
    assert caught.value.last_version is None
    with pytest.raises(LogLost):
        await logged(store)


async def test_a_rolled_back_log_says_how_far_it_goes_and_takes_the_tail_again(
    store: RedisStore, owner: Ownership, admin: Redis
) -> None:
    await store.append(owner, entries(1, 5))
    before = await admin.dump("equipoise:{lm}:u1:log")
    assert before is not None
    await store.append(owner, entries(6, 9))
    await admin.restore("equipoise:{lm}:u1:log", 0, before, replace=True)
    with pytest.raises(LogLost) as caught:
        await store.append(owner, entries(10, 10))
    assert caught.value.last_version == 5
    await store.append(owner, entries(6, 10))
    assert await logged(store) == entries(1, 10)


async def test_a_redis_rolled_back_behind_the_acquisition_is_a_loss_and_no_rival(
    store: RedisStore, owner: Ownership, admin: Redis
) -> None:
    before = await admin.dump("equipoise:{lm}:owner")
    assert before is not None
    later = await store.acquire("lm", address="b:1")
    await admin.restore("equipoise:{lm}:owner", 0, before, replace=True)
    with pytest.raises(LogLost) as caught:
        await store.append(later, entries(1, 1))
    assert caught.value.last_version is None


async def test_a_stale_owner_cannot_append_even_what_comes_next(store: RedisStore, owner: Ownership) -> None:
    await store.append(owner, entries(1, 2))
    heir = await store.acquire("lm", address="b:1")
    with pytest.raises(Fenced):
        await store.append(owner, entries(3, 3))
    await store.append(heir, entries(3, 3))
    assert (await store.log_state("lm")).last_version == 3


async def test_trimming_keeps_the_last_version(store: RedisStore, owner: Ownership) -> None:
    assert (await store.log_state("lm")).last_version == 0
    await store.append(owner, entries(1, 10))
    await store.trim(owner, through_version=7)
    assert await logged(store) == entries(8, 10)
    await store.trim(owner, through_version=10)
    state = await store.log_state("lm")
    assert (state.last_version, state.entries) == (10, 0)
    assert await logged(store) == []
    with pytest.raises(LogLost) as caught:
        await store.append(owner, entries(12, 12))
    assert caught.value.last_version == 10
    await store.append(owner, entries(9, 11))
    assert await logged(store) == entries(11, 11)


async def test_the_last_version_survives_rewriting_the_file_and_a_restart(tmp_path: Path, short_dir: Path) -> None:
    directory = short_dir / "aof"
    directory.mkdir()
    settings = ("--appendonly", "yes", "--aof-use-rdb-preamble", "no")
    with running_redis(directory, *settings) as process:
        store = RedisStore.connect(process.url, command_timeout_s=5)
        for name in ("empty", "trimmed"):
            await store.create(policy(name))
        owner = await store.acquire("trimmed", address="a:1")
        await store.append(owner, entries(1, 10))
        await store.trim(owner, through_version=10)
        admin = Redis.from_url(process.url, protocol=2)
        await admin.bgrewriteaof()

        async def rewritten() -> bool:
            info = await admin.info("persistence")
            assert info["aof_last_bgrewrite_status"] == "ok"
            return not info["aof_rewrite_in_progress"] and not info["aof_rewrite_scheduled"]

        await eventually(rewritten)
        await admin.aclose()
        await store.close()
    with running_redis(directory, *settings) as process:
        store = RedisStore.connect(process.url, command_timeout_s=5)
        assert (await store.log_state("trimmed")).last_version == 10
        assert (await store.log_state("empty")).last_version == 0
        await store.append(owner, entries(11, 11))
        await store.append(await store.acquire("empty", address="a:1"), entries(1, 1))
        await store.close()


async def test_reading_in_chunks_loses_nothing(store: RedisStore, owner: Ownership) -> None:
    small, large = entries(1, 3000, size=10), entries(3001, 3020, size=200_000)
    await store.append(owner, small)
    await store.append(owner, large)
    assert [entry.version async for entry in store.read_log(owner, after=0)] == list(range(1, 3021))
    assert await logged(store, after=3018) == large[-2:]


async def test_no_append_is_larger_than_its_limit(store: RedisStore, owner: Ownership, admin: Redis) -> None:
    batch = entries(1, 40, size=10_000)
    assert sum(map(entry_bytes, batch)) > 3 * MAX_APPEND_BYTES
    before = (await admin.info("commandstats"))["cmdstat_evalsha"]["calls"]
    await store.append(owner, batch)
    calls = (await admin.info("commandstats"))["cmdstat_evalsha"]["calls"] - before
    assert calls == -(-sum(map(entry_bytes, batch)) // MAX_APPEND_BYTES)
    assert await logged(store) == batch


async def test_an_entry_larger_than_the_limit_travels_alone(store: RedisStore, owner: Ownership) -> None:
    batch = [*entries(1, 1), *entries(2, 2, size=3 * MAX_APPEND_BYTES), *entries(3, 3)]
    await store.append(owner, batch)
    assert await logged(store) == batch


async def test_scripts_that_redis_forgot_are_sent_again(store: RedisStore, owner: Ownership, admin: Redis) -> None:
    await store.append(owner, entries(1, 1))
    await admin.script_flush()
    await store.append(owner, entries(2, 2))
    assert await logged(store) == entries(1, 2)
