from pathlib import Path

import pytest
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.sentinel import SentinelConnectionPool

from equipoise_server.redis_url import RedisAccess
from equipoise_server.store import InvalidStoreUrl
from equipoise_server.store.connect import client_for


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://h:7000/3", {"host": "h", "port": 7000, "db": 3}),
        ("redis://:p%40ss@h", {"host": "h", "password": "p@ss"}),
        ("rediss://user:secret@h:7000", {"host": "h", "username": "user", "password": "secret"}),
        ("unix:///run/redis.sock?db=2", {"path": "/run/redis.sock", "db": 2}),
    ],
)
def test_single_redis(url: str, expected: dict[str, object]) -> None:
    client = client_for(url, command_timeout_s=0.5)
    assert isinstance(client, Redis)
    found = client.connection_pool.connection_kwargs
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize("url", ["redis://h", "rediss://h", "unix:///s", "redis+sentinel://h/m"])
def test_every_wait_is_bounded(url: str) -> None:
    client = client_for(url, command_timeout_s=0.5)
    assert isinstance(client, Redis)
    found = client.connection_pool.connection_kwargs
    assert found["socket_timeout"] == found["socket_connect_timeout"] == 0.5
    assert found["retry"].get_retries() == 0
    assert client.connection_pool.max_connections <= 64


def test_sentinel() -> None:
    access = RedisAccess(sentinel_username="su", sentinel_password="sp", tls_ca=Path("ca.pem"))
    client = client_for("rediss+sentinel://u:p@a:1,b,[::1]:3/main/2", access=access, command_timeout_s=0.5)
    assert isinstance(client, Redis)
    pool = client.connection_pool
    assert isinstance(pool, SentinelConnectionPool)
    assert pool.service_name == "main"
    found = pool.connection_kwargs
    assert (found["db"], found["username"], found["password"], found["ssl_ca_certs"]) == (2, "u", "p", "ca.pem")
    guards = [sentinel.connection_pool.connection_kwargs for sentinel in pool.sentinel_manager.sentinels]
    assert [(each["host"], each["port"]) for each in guards] == [("a", 1), ("b", 26379), ("::1", 3)]
    for each in guards:
        assert each["socket_timeout"] == 0.5
        assert (each["username"], each["password"], each["ssl_ca_certs"]) == ("su", "sp", "ca.pem")


async def test_cluster() -> None:
    client = client_for("redis+cluster://a:1,b", access=RedisAccess(password="p"), command_timeout_s=0.5)
    assert isinstance(client, RedisCluster)
    nodes = client.nodes_manager.startup_nodes.values()
    assert {(node.host, node.port) for node in nodes} == {("a", 1), ("b", 6379)}
    assert client.connection_kwargs["password"] == "p"
    assert client.connection_kwargs["socket_timeout"] == 0.5
    await client.aclose()


def test_a_bad_url_is_refused_without_its_password() -> None:
    with pytest.raises(InvalidStoreUrl, match="a store's URL must have a host") as caught:
        client_for("redis://user:secret@")
    assert "secret" not in str(caught.value)
