from collections.abc import AsyncIterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.crc import key_slot

from equipoise_server.store import Page, RedisStore
from tests.ports import free_port
from tests.server.store.conftest import entries, eventually, logged, policy, running_redis, write_header, write_page


@pytest.fixture
async def cluster(short_dir: Path) -> AsyncIterator[tuple[RedisStore, Any]]:
    directory = Path(mkdtemp(prefix="cluster-", dir=short_dir))
    port = free_port()
    settings = ("--cluster-enabled", "yes", "--port", str(port), "--bind", "127.0.0.1")
    with running_redis(directory, *settings) as process:
        admin: Any = Redis.from_url(process.url, protocol=2)
        await admin.execute_command("CLUSTER", "ADDSLOTS", *range(16384))

        async def ready() -> bool:
            return bool((await admin.execute_command("CLUSTER INFO"))["cluster_state"] == "ok")

        await eventually(ready)
        store = RedisStore.connect(f"redis+cluster://127.0.0.1:{port}", command_timeout_s=5)
        yield store, admin
        await store.close()
        await admin.aclose()


async def test_everything_works_on_a_cluster_and_a_policy_stays_in_one_slot(
    cluster: tuple[RedisStore, Any],
) -> None:
    store, admin = cluster
    for name in ("lm", "vision", "speech.v2"):
        await store.create(policy(name))
    assert [found.name for found in await store.list_policies(limit=10)] == ["lm", "speech.v2", "vision"]
    owner = await store.acquire("lm", address="a:1")
    await store.append(owner, entries(1, 5))
    await write_page(store, owner, 1, Page(version=5, columns={"raw": b"x" * 600_000}))
    await write_header(store, owner, {"scalars": b"5"})
    await store.trim(owner, through_version=4)
    assert await logged(store) == entries(5, 5)
    pages = [(index, Page(version=7, columns={"raw": b"y"})) for index in range(300)]
    owner = await store.republish(owner, policy(), version=7, pages=pages, header={})
    await store.append(owner, entries(8, 8))
    assert await store.read_page("lm", 299) == pages[-1][1]
    of_policy = [key for key in await admin.keys() if b"{lm}" in key]
    assert len(of_policy) == 305  # spec, owner, log, header, manifest
    assert len({key_slot(key) for key in of_policy}) == 1
    await store.delete("lm")
    assert [key for key in await admin.keys() if b"{lm}" in key] == [b"equipoise:{lm}:owner"]
    assert [found.name for found in await store.list_policies(limit=10)] == ["speech.v2", "vision"]


async def test_which_policies_leaving_servers_have_is_found_on_a_cluster_too(cluster: tuple[RedisStore, Any]) -> None:
    store, _ = cluster
    for instance, leaving in (("leaves", True), ("stays", False)):
        await store.heartbeat(instance, address=f"{instance}:1", ttl_s=60, leaving=leaving)
    names = ("lm", "vision", "speech.v2", "nobody-s")
    for name, instance in zip(names, ("leaves", "stays", "leaves", ""), strict=True):
        await store.create(policy(name))
        if instance:
            owner = await store.acquire(name, address=f"{instance}:1", instance=instance)
    assert await store.departing([*names, "none"]) == {"lm", "speech.v2"}
    await store.release(owner)
    assert await store.departing(names) == {"lm"}
    await store.end_heartbeat("leaves")
    assert await store.departing(names) == set()
