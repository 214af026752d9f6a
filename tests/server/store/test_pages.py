import asyncio

import pytest
from redis.asyncio import Redis

from equipoise_server.store import (
    MAX_COMMAND_BYTES,
    Fenced,
    Interrupted,
    LogLost,
    Ownership,
    Page,
    PageBatch,
    RedisStore,
    Unavailable,
)
from tests.server.store.conftest import CountingObserver, RedisProcess, entries, policy, write_header, write_page


@pytest.fixture
async def owner(store: RedisStore) -> Ownership:
    await store.create(policy())
    found = await store.acquire("lm", address="a:1")
    await store.append(found, entries(1, 9))  # no page is ahead of the log
    return found


def page(version: int, *, size: int = 1_000_000) -> Page:
    fill = str(version).encode() * size
    return Page(version=version, columns={"raw": fill[:size], "statistic": fill[: size // 2], "none": b""})


async def test_pages_come_back_whole(store: RedisStore, owner: Ownership) -> None:
    assert await store.read_page(owner, 3) is None
    for version, size in ((1, 10), (2, 1_000_000), (3, MAX_COMMAND_BYTES), (4, 0)):
        await write_page(store, owner, 3, page(version, size=size))
        assert await store.read_page("lm", 3) == page(version, size=size)
    assert await store.read_page(owner, 2) is None


async def test_many_columns_fit_too(store: RedisStore, owner: Ownership) -> None:
    wide = Page(version=1, columns={f"a/{n}": str(n).encode() for n in range(5000)})
    await write_page(store, owner, 0, wide)
    assert await store.read_page(owner, 0) == wide


async def test_headers_come_back_whole(store: RedisStore, owner: Ownership) -> None:
    assert await store.read_header(owner) == {}
    for fields in ({"scalars": b"{}", "trainers": b"t" * 700_000}, {"scalars": b""}, {}):
        await write_header(store, owner, fields)
        assert await store.read_header("lm") == fields


async def test_no_command_exceeds_the_limit(store: RedisStore, owner: Ownership, shared_redis: RedisProcess) -> None:
    spy, command = await asyncio.open_unix_connection(str(shared_redis.socket), limit=4 * MAX_COMMAND_BYTES)
    command.write(b"MONITOR\r\n")
    assert await spy.readline() == b"+OK\r\n"
    await write_page(store, owner, 0, page(1))
    await store.ping()
    sizes: list[int] = []
    # What scripts do inside Redis is marked `lua` and travels on no wire.
    while b'"PING"' not in (seen := await spy.readline()):
        if b" lua]" not in seen[:64]:
            sizes.append(len(seen))
    command.close()
    await command.wait_closed()
    assert sum(sizes) > 1_500_000
    assert max(sizes) <= MAX_COMMAND_BYTES
    # Nor does it dribble.
    assert len(sizes) <= 8


async def test_a_reader_sees_the_old_or_the_new_page(store: RedisStore, owner: Ownership) -> None:
    await write_page(store, owner, 0, page(1))
    writing = asyncio.create_task(write_page(store, owner, 0, page(2)))
    seen = set()
    while not writing.done():
        found = await store.read_page(owner, 0)
        assert found in (page(1), page(2))
        seen.add(found.version)
    await writing
    assert seen >= {1}
    assert await store.read_page(owner, 0) == page(2)


async def test_pages_written_at_once_do_not_mix(store: RedisStore, owner: Ownership) -> None:
    await asyncio.gather(*(write_page(store, owner, index, page(index)) for index in range(6)))
    for index in range(6):
        assert await store.read_page(owner, index) == page(index)


async def test_two_attempts_at_one_page_do_not_mix_even_without_the_lock_between_them(
    store: RedisStore, owner: Ownership, admin: Redis
) -> None:
    """As when a command of an attempt that timed out arrives late."""
    twin = RedisStore(admin)
    interrupted = 0
    for _ in range(10):
        both = [write_page(store, owner, 0, page(1)), write_page(twin, owner, 0, page(2))]
        failures = [failure for failure in await asyncio.gather(*both, return_exceptions=True) if failure]
        assert all(isinstance(failure, Interrupted) for failure in failures)
        interrupted += len(failures)
        assert await store.read_page(owner, 0) in (page(1), page(2), None)
    assert interrupted > 0
    assert await store.read_page(owner, 0) is not None


async def half_written(store: RedisStore, owner: Ownership, observer: CountingObserver) -> None:
    """Begin a large page and be cut off after its first command."""
    before = observer.commands.count("stage")
    writing = asyncio.create_task(write_page(store, owner, 0, page(2)))
    await observer.until("stage", count=before + 1)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing


async def test_what_a_dead_owner_left_half_written_is_removed(
    store: RedisStore, owner: Ownership, observer: CountingObserver, admin: Redis
) -> None:
    await write_page(store, owner, 0, page(1))
    await half_written(store, owner, observer)
    assert await admin.exists("equipoise:{lm}:staging")
    heir = await store.acquire("lm", address="b:1")
    assert not await admin.exists("equipoise:{lm}:staging")
    assert await store.read_page(heir, 0) == page(1)


async def test_an_owner_fenced_half_way_does_not_swap_its_page_in(
    store: RedisStore, owner: Ownership, observer: CountingObserver, admin: Redis
) -> None:
    await write_page(store, owner, 0, page(1))
    writing = asyncio.create_task(write_page(store, owner, 0, page(2)))
    await observer.until("stage", count=3)
    heir = await store.acquire("lm", address="b:1")
    with pytest.raises(Fenced):
        await writing
    assert await store.read_page(heir, 0) == page(1)
    assert not await admin.exists("equipoise:{lm}:staging")


async def test_a_late_command_of_an_abandoned_attempt_does_not_mix_pages(
    store: RedisStore, owner: Ownership, shared_redis: RedisProcess
) -> None:
    hasty = RedisStore.connect(shared_redis.url, command_timeout_s=2.0)
    await hasty.ping()
    with shared_redis.paused(), pytest.raises(Unavailable):
        await write_page(hasty, owner, 0, page(1))
    await write_page(store, owner, 0, page(2))
    assert await store.read_page(owner, 0) == page(2)
    await hasty.close()


async def test_a_flushed_redis_is_noticed_by_pages(store: RedisStore, owner: Ownership, admin: Redis) -> None:
    await admin.flushall()
    with pytest.raises(LogLost) as caught:
        await write_page(store, owner, 0, page(1, size=10))
    assert caught.value.last_version is None
    assert await admin.keys() == []


async def test_a_large_write_does_not_hold_up_another_policy(
    store: RedisStore, owner: Ownership, shared_redis: RedisProcess
) -> None:
    """While one policy's pages are written, commands of another pass between them."""
    await store.create(policy("other"))
    writing = asyncio.create_task(write_page(store, owner, 0, page(1, size=16_000_000)))
    passed = 0
    while not writing.done():
        await store.get("other")
        passed += 1
    await writing
    assert passed >= 10


async def test_nothing_is_written_that_is_ahead_of_the_log(store: RedisStore, owner: Ownership) -> None:
    """A Redis that was rolled back would hold pages with steps that their trainers send again."""
    with pytest.raises(LogLost) as caught:
        await write_page(store, owner, 0, page(10))
    assert caught.value.last_version == 9
    assert await store.read_page(owner, 0) is None
    with pytest.raises(LogLost):
        await store.write_header(owner, {}, version=10, batch=PageBatch())


async def test_a_header_is_written_behind_all_pages_of_its_batch_or_not_at_all(
    store: RedisStore, owner: Ownership, admin: Redis
) -> None:
    batch = PageBatch()
    await store.write_page(owner, 0, page(5), batch=batch)
    before = await admin.dump(b"equipoise:{lm}:owner")
    await store.write_page(owner, 1, page(6), batch=batch)
    await admin.restore(b"equipoise:{lm}:owner", 0, before, replace=True)  # as a Redis that went back
    with pytest.raises(LogLost) as caught:
        await store.write_header(owner, {}, version=6, batch=batch)
    assert caught.value.last_version == 9
    batch = PageBatch()
    await store.write_page(owner, 1, page(6), batch=batch)
    await store.write_header(owner, {"scalars": b"6"}, version=6, batch=batch)
    assert await store.read_header(owner) == {"scalars": b"6"}
