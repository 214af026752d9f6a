import pytest
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.sentinel import SentinelConnectionPool

from equipoise_server.store import InvalidStoreUrl, without_password
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
    client = client_for("redis+sentinel://u:p@a:1,b,[::1]:3/main/2?sentinel_password=sp", command_timeout_s=0.5)
    assert isinstance(client, Redis)
    pool = client.connection_pool
    assert isinstance(pool, SentinelConnectionPool)
    assert pool.service_name == "main"
    found = pool.connection_kwargs
    assert (found["db"], found["username"], found["password"]) == (2, "u", "p")
    guards = [sentinel.connection_pool.connection_kwargs for sentinel in pool.sentinel_manager.sentinels]
    assert [(each["host"], each["port"]) for each in guards] == [("a", 1), ("b", 26379), ("::1", 3)]
    assert all(each["socket_timeout"] == 0.5 and each["password"] == "sp" for each in guards)


async def test_cluster() -> None:
    client = client_for("redis+cluster://:p@a:1,b", command_timeout_s=0.5)
    assert isinstance(client, RedisCluster)
    nodes = client.nodes_manager.startup_nodes.values()
    assert {(node.host, node.port) for node in nodes} == {("a", 1), ("b", 6379)}
    assert client.connection_kwargs["password"] == "p"
    assert client.connection_kwargs["socket_timeout"] == 0.5
    await client.aclose()


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://user:secret@h", "unknown scheme 'http'"),
        ("h:6379", "unknown scheme"),
        ("", "unknown scheme"),
        ("redis://user:secret@", "no host"),
        ("redis://user:secret@h:x", "Port could not be cast"),
        ("redis://user:secret@h:99999", "Port out of range"),
        ("redis://user:secret@h?socket_timeout=x", "socket_timeout"),
        ("unix://", "path of a socket"),
        ("redis+sentinel://user:secret@h", "no master's name"),
        ("redis+sentinel://user:secret@h/m/x", "not a number"),
        ("redis+sentinel://user:secret@h,,i/m", "empty host"),
        ("redis+cluster://user:secret@h:1,h:y", "Port could not be cast"),
        ("redis+cluster://user:secret@h/1", "no databases"),
    ],
)
def test_a_bad_url_is_named_without_its_password(url: str, why: str) -> None:
    with pytest.raises(InvalidStoreUrl, match=why) as caught:
        client_for(url)
    assert "secret" not in str(caught.value)


def test_a_url_can_be_shown() -> None:
    assert without_password("rediss://user:s3@cret@h:1/2?password=s3") == "rediss://user:***@h:1/2"
    assert without_password("redis://:s3@a,b/m") == "redis://:***@a,b/m"
    assert without_password("unix:///run/r.sock") == "unix:///run/r.sock"
