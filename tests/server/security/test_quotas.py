import asyncio
from pathlib import Path

import pytest

from equipoise_server.errors import ServiceError
from equipoise_server.security import StorageQuotas
from equipoise_server.security.tenants import Tenant
from equipoise_server.store import RedisStore
from tests.server.store.conftest import running_redis

RED = Tenant(name="red", prefix="red-", max_policies=4, max_examples=100)


def quotas(store: RedisStore, stored: list[int]) -> StorageQuotas:
    """Those of one server."""

    async def sizes(prefix: str) -> list[int]:
        assert prefix == "red-"
        return list(stored)

    return StorageQuotas(sizes, lambda name: store.lock(name, lease_s=60, wait_s=60))


async def test_servers_of_one_store_add_for_a_tenant_one_after_the_other(tmp_path: Path) -> None:
    stored: list[int] = []
    refused: list[str] = []

    async def create(server: StorageQuotas) -> None:
        try:
            async with server.adding(RED, num_examples=10):
                await asyncio.sleep(0.02)  # others have time to count, too
                stored.append(10)
        except ServiceError as error:
            refused.append(error.reason)

    with running_redis(tmp_path) as process:
        stores = [RedisStore.connect(process.url, command_timeout_s=5) for _ in range(3)]
        servers = [quotas(store, stored) for store in stores]
        await asyncio.gather(*(create(servers[number % 3]) for number in range(9)))
        for store in stores:
            await store.close()
    assert stored == [10] * 4
    assert refused == ["QUOTA_POLICIES"] * 5


async def test_examples_are_counted_with_those_that_are_stored(tmp_path: Path) -> None:
    with running_redis(tmp_path) as process:
        store = RedisStore.connect(process.url, command_timeout_s=5)
        server = quotas(store, [60])
        async with server.adding(RED, num_examples=40):
            pass
        with pytest.raises(ServiceError) as caught:
            async with server.adding(RED, num_examples=41):
                pytest.fail("it was let in")
        assert caught.value.reason == "QUOTA_EXAMPLES"
        await store.close()
