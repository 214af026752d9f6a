"""A policy that a newer release has stored is refused, by name and number, and left as it is."""

import json

import pytest
from redis.asyncio import Redis

from equipoise_server.store import FORMAT, NotFound, Ownership, Page, PageBatch, RedisStore, TooNew, seal
from tests.server.store.conftest import entries, policy, write_header, write_page

ADDRESS = "127.0.0.1:1"


async def dumped(admin: Redis) -> dict[bytes, bytes]:
    return {key: await admin.dump(key) for key in await admin.keys()}


async def owned(store: RedisStore, name: str = "lm") -> Ownership:
    await store.create(policy(name, uid=f"uid-{name}"))
    owner = await store.acquire(name, address=ADDRESS)
    await store.append(owner, [seal(entry, after=0) for entry in entries(1, 3)])
    await write_page(store, owner, 0, Page(version=2, columns={"r": b"1234"}))
    await write_header(store, owner, {"progress": b"{}"})
    return owner


async def test_what_a_newer_release_has_stored_is_refused_and_stays_as_it_is(store: RedisStore, admin: Redis) -> None:
    await store.release(await owned(store))
    await owned(store, "other")
    await admin.hset("equipoise:{lm}:spec", "format", FORMAT + 1)
    before = await dumped(admin)
    for attempt in (
        lambda: store.acquire("lm", address="127.0.0.1:2"),
        lambda: store.get("lm"),
        lambda: store.create(policy("lm")),
        lambda: store.salvage().remains("lm"),
    ):
        with pytest.raises(TooNew, match=rf"'lm' is stored in format {FORMAT + 1}, .* reads formats up to {FORMAT}$"):
            await attempt()
    assert await dumped(admin) == before
    assert [found.name for found in await store.list_policies(limit=10)] == ["other"]
    assert (await store.acquire("other", address=ADDRESS)).epoch == 2


async def test_a_server_that_was_fenced_by_a_newer_release_writes_nothing_any_more(
    store: RedisStore, admin: Redis
) -> None:
    owner = await owned(store)
    await admin.hset("equipoise:{lm}:spec", "format", FORMAT + 1)
    await admin.hset("equipoise:{lm}:owner", mapping={"token": "newer", "epoch": 2})
    before = await dumped(admin)
    with pytest.raises(TooNew):
        await store.acquire("lm", address="127.0.0.1:2")
    for attempt in (
        lambda: store.append(owner, entries(4, 4)),
        lambda: store.write_page(owner, 0, Page(version=3, columns={"r": b"5678"}), batch=PageBatch()),
        lambda: store.trim(owner, through_version=3),
    ):
        with pytest.raises(Exception, match="another owner"):
            await attempt()
    assert await dumped(admin) == before


async def test_who_takes_over_what_an_older_release_has_stored_raises_its_format_first(
    store: RedisStore, admin: Redis
) -> None:
    await store.create(policy())
    spec = "equipoise:{lm}:spec"
    text = (await admin.hget(spec, "spec")).decode()
    await admin.hdel(spec, "format")
    await admin.hset(spec, "spec", text.partition("\n")[0])  # format 1 had no checksum
    assert (await store.get("lm")) == policy()
    await store.acquire("lm", address=ADDRESS)
    assert await admin.hmget(spec, "format", "spec") == [str(FORMAT).encode(), text.encode()]
    with pytest.raises(json.JSONDecodeError):  # which is how release 0.1.0 reads it
        json.loads(await admin.hget(spec, "spec"))
    assert (await store.get("lm")) == policy()


async def test_what_is_written_anew_has_its_format(store: RedisStore, admin: Redis) -> None:
    owner = await owned(store)
    await admin.flushall()
    await store.republish(owner, policy(uid="uid-lm"), version=3, pages=[], header={})
    assert await admin.hget("equipoise:{lm}:spec", "format") == str(FORMAT).encode()
    with pytest.raises(NotFound):
        await store.acquire("nobody", address=ADDRESS)


SHAPE = {
    "spec": {"uid", "create_time", "spec", "generation", "format"},
    "owner": {
        *("uid", "token", "epoch", "address", "instance", "batch", "batched"),
        *("pages:GENERATION", "manifest:GENERATION", "header:GENERATION"),
    },
    "page:0": {"version", "checksum", "r/0"},
    "manifest": {"0"},
    "progress": {"checksum", "progress/0"},
    "log": {"ids", "t", "+"},
}
"""Fields of each key in format 2. Where this has to change, FORMAT grows, unless older releases rightly overlook it."""


async def test_what_is_stored_has_the_fields_of_this_format(store: RedisStore, admin: Redis) -> None:
    assert FORMAT == 2
    await owned(store)
    found: dict[str, set[str]] = {}
    for key in await admin.keys("equipoise:{lm}:*"):
        kind = key.decode().removeprefix("equipoise:{lm}:").removeprefix("uid-lm:")
        if kind == "log":
            fields = {name for _, fields in await admin.xrange(key) for name in fields}
        else:
            fields = set(await admin.hkeys(key))
        found[kind] = {name.decode().replace("uid-lm", "GENERATION") for name in fields}
    assert found == SHAPE
