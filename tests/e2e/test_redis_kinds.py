"""Kinds of Redis: what cannot keep policies is named, in the log, by readiness, and once; what can is used."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from equipoise import PolicyAdmin, PolicyClient, PolicySpec
from equipoise.errors import StateLostError
from tests.e2e.faults.gauges import not_ready
from tests.e2e.faults.proxy import until
from tests.e2e.faults.redis_server import RedisServer, running
from tests.servers import serve

PASSWORD = "hunter2"


def credentials(directory: Path, *, user: str) -> dict[str, Any]:
    """Settings that enter Redis as a user."""
    (directory / "password").write_text(PASSWORD)
    return {"redis_password_file": directory / "password"} | ({"redis_username": user} if user else {})


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[RedisServer]:
    with running(tmp_path / "redis") as server:
        yield server


def assert_refused(url: str, *words: str, **settings: Any) -> None:
    """The server starts, never becomes ready, and says why: once."""
    with serve(redis_url=url, **settings) as server:
        until(lambda: all(word in not_ready(server) for word in words), what=f"readiness says {words}")
        time.sleep(2.5)  # it asks once a second
        told = [line for line in server.log.splitlines() if "redis cannot be used" in line]
        assert len(told) == 1
        assert all(word in told[0].lower() for word in words)


def assert_used(url: str, **settings: Any) -> None:
    with (
        serve(redis_url=url, **settings) as server,
        PolicyClient(server.address, policy="p", num_examples=4, when_lost="wait") as client,
    ):
        client.step([0], contributions=[1.0])
        assert client.flush(30, durable=True)
        until(lambda: not not_ready(server), what="the server is ready")


def slow(*values: str) -> list[Any]:
    """The same with other values: a server each."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize("policy", ["allkeys-lru", *slow("allkeys-lfu", "allkeys-random")])
def test_a_redis_that_evicts_is_refused(plain: RedisServer, policy: str) -> None:
    plain.command("CONFIG", "SET", "maxmemory-policy", policy)
    assert_refused(plain.url, f"maxmemory-policy {policy}", "noeviction")


def test_one_that_evicts_what_expires_is_used(plain: RedisServer) -> None:
    plain.command("CONFIG", "SET", "maxmemory-policy", "volatile-lru")
    assert_used(plain.url)


@pytest.mark.parametrize("command", ["evalsha", "memory", *slow("xinfo", "xadd", "set", "zadd", "hgetall", "unlink")])
def test_a_permission_that_is_missing_is_named(plain: RedisServer, tmp_path: Path, command: str) -> None:
    plain.command("ACL", "SETUSER", "eq", "on", f">{PASSWORD}", "~equipoise:*", "+@all", f"-{command}")
    assert_refused(plain.url, "auth", command, **credentials(tmp_path, user="eq"))


def test_a_user_with_the_documented_permissions_is_enough(plain: RedisServer, tmp_path: Path) -> None:
    readme = Path(__file__).parents[2] / "README.md"
    (line,) = (line.strip() for line in readme.read_text().splitlines() if line.strip().startswith("ACL SETUSER"))
    plain.command(*line.replace(">PASSWORD", f">{PASSWORD}").split())
    assert_used(plain.url, **credentials(tmp_path, user="equipoise"))


def test_a_replica_that_only_reads_is_refused(plain: RedisServer, tmp_path: Path) -> None:
    with running(tmp_path / "replica") as replica:
        replica.command("REPLICAOF", "127.0.0.1", plain.port)
        with replica.client() as client:
            until(lambda: client.info("replication")["master_link_status"] == "up", what="it follows")
        assert_refused(replica.url, "readonly")


def test_a_full_redis_is_refused_until_there_is_room(plain: RedisServer) -> None:
    plain.command("CONFIG", "SET", "maxmemory", 1)
    with serve(redis_url=plain.url) as server:
        until(lambda: "oom" in not_ready(server), what="readiness says so")
        plain.command("CONFIG", "SET", "maxmemory", 0)
        until(lambda: not not_ready(server), what="the server is ready")


def test_a_node_of_a_cluster_by_a_plain_url_is_told_apart(tmp_path: Path) -> None:
    with running(tmp_path / "node", **{"cluster-enabled": "yes"}) as node:
        node.command("CLUSTER", "ADDSLOTS", 0)
        assert_refused(node.url, "cluster")


def test_a_wrong_password_is_named_and_not_told(plain: RedisServer, tmp_path: Path) -> None:
    plain.command("CONFIG", "SET", "requirepass", "right")
    with serve(redis_url=plain.url, **credentials(tmp_path, user="")) as server:
        until(lambda: "auth" in not_ready(server), what="readiness says so")
        assert PASSWORD not in server.log + not_ready(server)


def test_eviction_under_the_server_is_told_as_a_loss(plain: RedisServer) -> None:
    """Whoever changes the setting later: what is gone is not taken for what was never written."""
    with serve(redis_url=plain.url) as server, PolicyAdmin(server.address) as admin:
        admin.create(PolicySpec(name="p", num_examples=100))
        assert server.stop() == 0
    with plain.client() as client:
        (key,) = client.keys("*:spec")
        client.delete(key)
    with (
        serve(redis_url=plain.url) as server,
        PolicyAdmin(server.address) as admin,
        pytest.raises(StateLostError, match="the specification is damaged"),
    ):
        admin.create(PolicySpec(name="p", num_examples=100))
