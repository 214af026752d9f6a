import asyncio
import dataclasses
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor

import pytest
from redis.asyncio import Redis

from equipoise_server.store import Deleted, Fenced, NotFound, OwnedElsewhere, Ownership, Page, RedisStore
from equipoise_server.store.policies import TOMBSTONE_TTL_S
from tests.server.store.conftest import (
    CountingObserver,
    RedisProcess,
    entries,
    logged,
    policy,
    write_header,
    write_page,
)

ADDRESS = "127.0.0.1:1"


async def test_creating_twice_returns_the_first(store: RedisStore) -> None:
    assert await store.get("lm") is None
    assert await store.create(policy(uid="u1")) == (policy(uid="u1"), True)
    assert await store.create(policy(uid="u2", spec="{}")) == (policy(uid="u1"), False)
    assert await store.get("lm") == policy(uid="u1")


async def test_of_many_who_create_at_once_one_wins(store: RedisStore) -> None:
    answers = await asyncio.gather(*(store.create(policy(uid=f"u{i}")) for i in range(20)))
    assert sum(new for _, new in answers) == 1
    assert len({stored.uid for stored, _ in answers}) == 1


async def test_each_acquisition_fences_the_last_owner_everywhere(store: RedisStore, observer: CountingObserver) -> None:
    await store.create(policy())
    first = await store.acquire("lm", address="a:1")
    second = await store.acquire("lm", address="b:1")
    assert second.epoch == first.epoch + 1
    assert second.token != first.token
    owner = await store.owner("lm")
    assert owner is not None
    assert (owner.address, owner.epoch) == ("b:1", second.epoch)
    writes = [
        store.append(first, entries(1, 1)),
        write_page(store, first, 0, Page(version=1, columns={"raw": b"x"})),
        write_header(store, first, {"k": b"v"}),
        store.trim(first, through_version=0),
    ]
    for write in writes:
        with pytest.raises(Fenced):
            await write
    assert observer.errors == ["fenced"] * len(writes)
    assert await logged(store) == []
    assert await store.read_page("lm", 0) is None
    assert await store.read_header("lm") == {}
    await store.append(second, entries(1, 1))


async def test_nobody_can_acquire_what_does_not_exist(store: RedisStore) -> None:
    with pytest.raises(NotFound, match="lm"):
        await store.acquire("lm", address="a:1")
    with pytest.raises(NotFound):
        await store.read_header("lm")
    assert await store.owner("lm") is None


async def filled(store: RedisStore, *, uid: str = "u1") -> Ownership:
    await store.create(policy(uid=uid))
    owner = await store.acquire("lm", address="a:1")
    await store.append(owner, entries(1, 3))
    for index in (0, 7):
        await write_page(store, owner, index, Page(version=3, columns={"raw": b"old"}))
    await write_header(store, owner, {"scalars": b"old"})
    return owner


async def test_deletion_leaves_a_tombstone_and_nothing_else(store: RedisStore, admin: Redis) -> None:
    owner = await filled(store)
    assert await store.delete("lm") == "u1"
    assert await admin.keys() == [b"equipoise:{lm}:owner"]
    assert await store.get("lm") is None
    assert await store.list_policies(limit=10) == []
    for write in (store.append(owner, entries(4, 4)), write_page(store, owner, 1, Page(version=4, columns={}))):
        with pytest.raises(Deleted):
            await write
    with pytest.raises(NotFound):
        await store.delete("lm")
    assert 0 < await admin.ttl("equipoise:{lm}:owner") <= TOMBSTONE_TTL_S


async def test_what_lives_has_no_time_to_live(store: RedisStore, admin: Redis) -> None:
    await filled(store)
    await store.delete("lm")
    owner = await filled(store, uid="u2")
    assert await admin.ttl("equipoise:{lm}:owner") == -1
    await admin.expire("equipoise:{lm}:owner", 1000)
    await store.republish(owner, policy(uid="u2"), version=3, pages=[], header={})
    assert await admin.ttl("equipoise:{lm}:owner") == -1


async def test_a_policy_created_again_is_empty_with_a_higher_epoch(store: RedisStore) -> None:
    dead = await filled(store, uid="u1")
    await store.delete("lm")
    await store.create(policy(uid="u2"))
    with pytest.raises(Fenced):
        await store.append(dead, entries(4, 4))
    reborn = await store.acquire("lm", address="a:1")
    assert reborn.epoch > dead.epoch
    assert await logged(store) == []
    assert await store.read_page(reborn, 0) is None
    assert await store.read_header(reborn) == {}
    with pytest.raises(Fenced):
        await store.append(dead, entries(1, 1))
    with pytest.raises(Fenced):
        await store.republish(dead, policy(uid="u1"), version=3, pages=[], header={})
    assert await store.get("lm") == policy(uid="u2")


async def test_deletion_by_uid_spares_a_namesake_and_can_be_repeated(store: RedisStore) -> None:
    await store.create(policy(uid="u1"))
    with pytest.raises(NotFound):
        await store.delete("lm", uid="u0")
    assert await store.delete("lm", uid="u1") == "u1"
    assert await store.delete("lm", uid="u1") == "u1"
    await store.create(policy(uid="u2"))
    with pytest.raises(NotFound):
        await store.delete("lm", uid="u1")
    assert await store.get("lm") == policy(uid="u2")


async def test_listing_follows_names_and_prefix(store: RedisStore) -> None:
    names = ["a", "b", "b-1", "b.x", "ba", "c"]
    for name in reversed(names):
        await store.create(policy(name))
    assert [found.name for found in await store.list_policies(limit=10)] == names
    assert [found.name for found in await store.list_policies(after="b-1", limit=2)] == ["b.x", "ba"]
    assert [found.name for found in await store.list_policies(prefix="b", limit=10)] == ["b", "b-1", "b.x", "ba"]
    assert [found.name for found in await store.list_policies(prefix="b", after="b.x", limit=10)] == ["ba"]
    assert [found.name for found in await store.list_policies(prefix="b", after="a", limit=1)] == ["b"]
    assert await store.list_policies(prefix="b", after="c", limit=10) == []
    assert await store.list_policies(prefix="d", limit=10) == []


async def test_pages_of_a_listing_stay_apart_while_policies_come_and_go(store: RedisStore) -> None:
    for number in range(0, 40, 2):
        await store.create(policy(f"p{number:02}"))
    seen: list[str] = []
    after = ""
    while found := await store.list_policies(after=after, limit=3):
        seen += [each.name for each in found]
        after = seen[-1]
        here = int(after[1:])
        await store.create(policy(f"p{max(here - 3, 1):02}", uid="behind"))
        if here + 4 < 40:
            await store.delete(f"p{here + 4:02}")
    assert seen == sorted(set(seen))
    deleted = {f"p{n:02}" for n in range(0, 40, 2)} - set(seen)
    assert [name for name in deleted if await store.get(name)] == []


async def test_names_without_a_policy_do_not_shorten_a_listing(store: RedisStore, admin: Redis) -> None:
    for name in ("a", "d"):
        await store.create(policy(name))
    # What a server leaves that died between the index and the spec.
    await admin.zadd("equipoise:index", {"b": 0, "c": 0})
    assert [found.name for found in await store.list_policies(limit=2)] == ["a", "d"]


class Interleaved:
    """Lets another server act, once, right after a command of this one."""

    def __init__(self, command: str, act: Callable[[], Coroutine[None, None, None]]) -> None:
        self._command = command
        self._act: Callable[[], Coroutine[None, None, None]] | None = act

    def command(self, name: str, seconds: float) -> None:
        if name == self._command and self._act is not None:
            act, self._act = self._act, None
            with ThreadPoolExecutor(1) as other:
                other.submit(lambda: asyncio.run(act())).result()

    def error(self, kind: str) -> None:
        raise AssertionError(kind)


async def test_a_policy_created_while_its_namesake_is_deleted_stays_listed(
    store: RedisStore, shared_redis: RedisProcess
) -> None:
    async def create_anew() -> None:
        other = RedisStore.connect(shared_redis.url, command_timeout_s=5)
        await other.create(policy(uid="u2"))
        await other.close()

    await store.create(policy(uid="u1"))
    deleting = RedisStore.connect(shared_redis.url, command_timeout_s=5, observer=Interleaved("delete", create_anew))
    assert await deleting.delete("lm") == "u1"
    await deleting.close()
    assert [found.uid for found in await store.list_policies(limit=10)] == ["u2"]


async def test_a_policy_whose_namesake_is_deleted_while_it_is_created_is_listed(
    store: RedisStore, shared_redis: RedisProcess
) -> None:
    async def delete_namesake() -> None:
        other = RedisStore.connect(shared_redis.url, command_timeout_s=5)
        await other.delete("lm")
        await other.close()

    await store.create(policy(uid="u1"))
    creating = RedisStore.connect(shared_redis.url, command_timeout_s=5, observer=Interleaved("index", delete_namesake))
    assert await creating.create(policy(uid="u2")) == (policy(uid="u2"), True)
    await creating.close()
    assert [found.uid for found in await store.list_policies(limit=10)] == ["u2"]


async def test_prefixes_are_worlds_of_their_own(store: RedisStore, admin: Redis) -> None:
    await store.create(policy())
    other = RedisStore(admin, prefix="other")
    assert await other.get("lm") is None
    assert await other.list_policies(limit=1) == []


async def test_ownership_outlives_a_new_client(store: RedisStore, admin: Redis) -> None:
    await store.create(policy())
    owner = await store.acquire("lm", address="a:1")
    again = RedisStore(admin)
    await again.append(dataclasses.replace(owner), entries(1, 1))
    assert await logged(store) == entries(1, 1)
    await again.close()


async def test_an_owner_at_the_same_address_is_a_former_self_unless_it_is_seen_to_live(
    shared_redis: RedisProcess, store: RedisStore
) -> None:
    other = RedisStore.connect(shared_redis.url, command_timeout_s=5)
    try:
        await store.create(policy())
        assert await other.claim_address("former", address=ADDRESS, ttl_s=60) == ""
        await other.heartbeat("former", address=ADDRESS, ttl_s=60)
        await other.acquire("lm", address=ADDRESS, instance="former")
        assert await store.claim_address("now", address=ADDRESS, ttl_s=60) == ""  # it may have ended since
        assert (await store.acquire("lm", address=ADDRESS, instance="now")).epoch == 2
        assert await store.claim_address("now", address=ADDRESS, ttl_s=60) == ""
        assert await other.claim_address("former", address=ADDRESS, ttl_s=60) == "now"
        assert await store.claim_address("now", address=ADDRESS, ttl_s=60) == "former"
        await store.heartbeat("now", address=ADDRESS, ttl_s=60)
        with pytest.raises(OwnedElsewhere):
            await other.acquire("lm", address=ADDRESS, instance="former")
        await store.end_heartbeat("now")
        assert (await other.acquire("lm", address=ADDRESS, instance="former")).epoch == 3
        assert await store.claim_address("now", address="127.0.0.1:9", ttl_s=60) == ""
    finally:
        await other.close()
