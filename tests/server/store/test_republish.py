import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
from redis.asyncio import Redis

from equipoise_server.store import Deleted, Fenced, LogLost, Ownership, Page, PageBatch, RedisStore
from tests.server.store.conftest import entries, logged, policy, write_header, write_page


@pytest.fixture
async def owner(store: RedisStore) -> Ownership:
    await store.create(policy())
    found = await store.acquire("lm", address="a:1")
    await store.append(found, entries(1, 4))
    await write_page(store, found, 0, page(4))
    await write_header(store, found, {"scalars": b"4"})
    return found


def page(version: int) -> Page:
    return Page(version=version, columns={"raw": str(version).encode() * 300_000})


class Crash(Exception):  # noqa: N818
    """The server dies here."""


def crashing() -> Iterator[tuple[int, Page]]:
    yield 0, page(9)
    raise Crash


async def test_after_a_flush_everything_is_back_and_goes_on(store: RedisStore, owner: Ownership, admin: Redis) -> None:
    await admin.flushall()
    pages = [(0, page(9)), (1, page(8))]
    renewed = await store.republish(owner, policy(), version=9, pages=pages, header={"scalars": b"9"})
    assert (renewed.token, renewed.epoch, renewed.uid) == (owner.token, owner.epoch, owner.uid)
    assert await store.get("lm") == policy()
    assert await store.list_policies(limit=5) == [policy()]
    assert [await store.read_page("lm", index) for index in range(3)] == [page(9), page(8), None]
    assert await store.read_header("lm") == {"scalars": b"9"}
    held = await store.owner("lm")
    assert held is not None
    assert held.address == "a:1"
    with pytest.raises(LogLost) as caught:
        await store.append(renewed, entries(11, 11))
    assert caught.value.last_version == 9
    await store.append(renewed, entries(10, 11))
    assert await logged(store) == entries(10, 11)
    heir = await store.acquire("lm", address="b:1")
    assert heir.epoch == owner.epoch + 1
    assert await logged(store, "lm", after=10) == entries(11, 11)


async def test_pages_may_come_one_by_one(store: RedisStore, owner: Ownership, admin: Redis) -> None:
    async def pages() -> AsyncIterator[tuple[int, Page]]:
        for index in range(3):
            await asyncio.sleep(0)
            yield index, page(9)

    await admin.flushall()
    renewed = await store.republish(owner, policy(), version=9, pages=pages(), header={})
    assert await store.read_page(renewed, 2) == page(9)


async def test_a_crash_half_way_after_a_flush_leaves_nothing_visible(
    store: RedisStore, owner: Ownership, admin: Redis
) -> None:
    await admin.flushall()
    with pytest.raises(Crash):
        await store.republish(owner, policy(), version=9, pages=crashing(), header={})
    assert await store.get("lm") is None
    assert await store.list_policies(limit=5) == []
    # Somebody creates the name anew: it is empty, and the remains go with the first acquisition.
    await store.create(policy(uid="u2"))
    heir = await store.acquire("lm", address="b:1")
    assert heir.epoch > owner.epoch
    assert await store.read_page(heir, 0) is None
    assert await logged(store) == []
    assert not [key for key in await admin.keys() if b":u1" in key]


async def test_a_crash_half_way_after_a_rollback_leaves_the_old_state_whole(
    store: RedisStore, owner: Ownership, admin: Redis
) -> None:
    with pytest.raises(Crash):
        await store.republish(owner, policy(), version=9, pages=crashing(), header={})
    heir = await store.acquire("lm", address="b:1")
    assert await store.read_page(heir, 0) == page(4)
    assert await logged(store) == entries(1, 4)
    assert await store.read_header(heir) == {"scalars": b"4"}
    keys = await admin.keys()
    assert {key for key in keys if b":u1" in key} == {
        b"equipoise:{lm}:u1:log",
        b"equipoise:{lm}:u1:manifest",
        b"equipoise:{lm}:u1:page:0",
        b"equipoise:{lm}:u1:progress",
    }


async def test_republishing_replaces_what_redis_still_had(store: RedisStore, owner: Ownership, admin: Redis) -> None:
    with pytest.raises(Crash):
        await store.republish(owner, policy(), version=9, pages=crashing(), header={})
    renewed = await store.republish(owner, policy(), version=9, pages=[(0, page(9))], header={})
    assert await store.read_page("lm", 0) == page(9)
    assert not [key for key in await admin.keys() if b":u1:" in key]
    assert (
        len([key for key in await admin.keys() if renewed.generation.encode() in key]) == 4
    )  # log, header, manifest, page


async def test_an_owner_that_was_overtaken_cannot_republish(store: RedisStore, owner: Ownership, admin: Redis) -> None:
    await store.acquire("lm", address="b:1")
    with pytest.raises(Fenced):
        await store.republish(owner, policy(), version=9, pages=[(0, page(9))], header={})
    assert await store.read_page("lm", 0) == page(4)


async def test_a_deleted_policy_cannot_be_republished(store: RedisStore, owner: Ownership) -> None:
    await store.delete("lm")
    with pytest.raises(Deleted):
        await store.republish(owner, policy(), version=9, pages=[], header={})
    assert await store.get("lm") is None


async def test_a_policy_newly_created_after_a_flush_is_not_overwritten(
    store: RedisStore, owner: Ownership, admin: Redis
) -> None:
    await admin.flushall()
    await store.create(policy(uid="u2"))
    with pytest.raises(Fenced):
        await store.republish(owner, policy(), version=9, pages=[], header={})
    assert await store.get("lm") == policy(uid="u2")


async def test_of_two_who_republish_after_a_flush_the_later_epoch_stays(
    store: RedisStore, owner: Ownership, admin: Redis
) -> None:
    later = await store.acquire("lm", address="b:1")
    await admin.flushall()
    old = await store.republish(owner, policy(), version=4, pages=[(0, page(4))], header={})
    new = await store.republish(later, policy(), version=9, pages=[(0, page(9))], header={})
    with pytest.raises(Fenced):
        await store.append(old, entries(5, 5))
    await store.append(new, entries(10, 10))
    assert await store.read_page("lm", 0) == page(9)


async def test_keys_that_the_spec_does_not_name_are_not_written(
    store: RedisStore, owner: Ownership, admin: Redis
) -> None:
    """A Redis that was rolled back behind the end of a republication reads the keys of before."""
    before = await admin.dump(b"equipoise:{lm}:spec")
    renewed = await store.republish(owner, policy(), version=9, pages=[(0, page(9))], header={})
    await admin.restore(b"equipoise:{lm}:spec", 0, before, replace=True)
    batch = PageBatch()
    for write in (
        store.append(renewed, entries(10, 10)),
        store.write_page(renewed, 0, page(9), batch=batch),
        store.write_header(renewed, {}, version=9, batch=batch),
        store.trim(renewed, through_version=9),
    ):
        with pytest.raises(LogLost) as caught:
            await write
        assert caught.value.last_version is None
    again = await store.republish(renewed, policy(), version=9, pages=[(0, page(9))], header={})
    await store.append(again, entries(10, 10))


async def test_failed_republications_leave_one_set_of_keys_at_most(
    store: RedisStore, owner: Ownership, admin: Redis
) -> None:
    for _ in range(3):
        with pytest.raises(Crash):
            await store.republish(owner, policy(), version=9, pages=crashing(), header={})
    pages = await admin.keys("equipoise:{lm}:*:page:*")
    assert len(pages) == 2  # what is in use, and the last attempt's
    await store.republish(owner, policy(), version=9, pages=[(0, page(9))], header={})
    assert len(await admin.keys("equipoise:{lm}:*:page:*")) == 1


async def test_a_publication_that_is_given_up_leaves_nothing(store: RedisStore, admin: Redis) -> None:
    reached = asyncio.Event()

    async def endless() -> AsyncIterator[tuple[int, Page]]:
        yield 0, page(0)
        reached.set()
        await asyncio.sleep(60)
        yield 1, page(0)

    publishing = asyncio.create_task(store.publish(policy("fork"), address="a:1", pages=endless(), header={}))
    await asyncio.wait_for(reached.wait(), 60)
    assert await admin.keys("equipoise:{fork}:*:page:*")
    publishing.cancel()
    await asyncio.wait([publishing])
    assert not await admin.keys("equipoise:{fork}:*:page:*")
    assert not await admin.keys("equipoise:{fork}:*:log")


async def test_a_republication_whose_pages_were_lost_meanwhile_does_not_end(
    store: RedisStore, owner: Ownership, admin: Redis
) -> None:
    async def forgetful() -> AsyncIterator[tuple[int, Page]]:
        yield 0, page(9)
        await admin.hset("equipoise:{lm}:owner", "batched", 0)  # as a Redis that went back
        yield 1, page(9)

    with pytest.raises(LogLost):
        await store.republish(owner, policy(), version=9, pages=forgetful(), header={})
    assert await store.read_header("lm") == {"scalars": b"4"}  # readers see what was there
