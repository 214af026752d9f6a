"""Sentinels and clusters that speak TLS alone, and ask for certificates, users and passwords: real ones."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from equipoise import PolicyClient
from equipoise_server.redis_url import RedisAccess
from equipoise_server.store import LogEntry, RedisStore, StoredPolicy
from tests.debian import redis_with_tls
from tests.e2e.faults.gauges import not_ready
from tests.e2e.faults.proxy import until
from tests.e2e.faults.redis_server import Guard, RedisServer, Sentinel, following, running, running_cluster
from tests.e2e.security.authority import Authority
from tests.servers import ServerProcess, serve

pytestmark = pytest.mark.slow  # a minute and a half together

ADMIN_PASSWORD, USER_PASSWORD = "adm1n-secret", "us3r-secret"
README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def guard(tmp_path: Path) -> Guard:
    program = redis_with_tls(what="Sentinels and clusters with TLS alone")
    authority = Authority(tmp_path)
    return Guard(program=program, authority=authority, own=authority.issue("redis"), password=ADMIN_PASSWORD)


@pytest.fixture
def entering(tmp_path: Path, guard: Guard) -> dict[str, Any]:
    """Settings of a server that enters as the documented user, with a certificate of its own."""
    (tmp_path / "password").write_text(USER_PASSWORD)
    certificate = guard.authority.issue("equipoise")
    return {
        "redis_username": "equipoise",
        "redis_password_file": tmp_path / "password",
        "redis_tls_ca": guard.authority.file,
        "redis_tls_certificate": certificate.certificate,
        "redis_tls_key": certificate.key,
    }


@pytest.fixture
def sentinel_password(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "sentinel-password").write_text(f"{ADMIN_PASSWORD}\n")
    return {"redis_sentinel_password_file": tmp_path / "sentinel-password"}


def add_user(redis: RedisServer, *more: str) -> None:
    """The user that README documents."""
    (line,) = (line.strip() for line in README.read_text().splitlines() if line.strip().startswith("ACL SETUSER"))
    redis.command(*line.replace(">PASSWORD", f">{USER_PASSWORD}").split(), *more)


@contextmanager
def watched(tmp_path: Path, guard: Guard) -> Iterator[tuple[RedisServer, RedisServer, Sentinel]]:
    """A master, its replica and a Sentinel."""
    with running(tmp_path / "master", guard=guard) as master, following(master, tmp_path / "replica") as replica:
        add_user(master)
        add_user(replica)
        sentinel = Sentinel(tmp_path / "sentinel", master_port=master.port, quorum=1, down_after_ms=500, guard=guard)
        sentinel.start()
        try:
            until(lambda: knows_replica(sentinel), what="the sentinel knows the replica")
            yield master, replica, sentinel
        finally:
            sentinel.kill()


def knows_replica(sentinel: Sentinel) -> bool:
    with sentinel.client() as client:
        found: list[Mapping[str, Any]] = client.sentinel_slaves("policies")
    return any(not each["is_disconnected"] for each in found)


def train(server: ServerProcess, steps: int, *, policy: str = "p") -> int:
    """Makes durable steps; version after them."""
    until(lambda: not not_ready(server), what=lambda: not_ready(server))
    with PolicyClient(server.address, policy=policy, num_examples=4, when_lost="wait") as client:
        for _ in range(steps):
            result = client.step([0, 1], contributions=[1.0, -1.0])
        assert client.flush(60, durable=True)
        return result.version


def assert_no_secret(server: ServerProcess) -> None:
    said = server.log + not_ready(server)
    assert ADMIN_PASSWORD not in said
    assert USER_PASSWORD not in said


async def test_a_store_closes_though_redis_does_not_answer(tmp_path: Path, guard: Guard) -> None:
    """TLS ends with a word from both sides."""
    with running(tmp_path / "redis", guard=guard) as redis:
        access = RedisAccess(
            password=ADMIN_PASSWORD,
            tls_ca=guard.authority.file,
            tls_certificate=guard.own.certificate,
            tls_key=guard.own.key,
        )
        store = RedisStore.connect(f"rediss://127.0.0.1:{redis.port}", access=access)
        await store.create(StoredPolicy(name="p", uid="u", create_time=0.0, spec="{}"))
        owner = await store.acquire("p", address="a:1")
        await store.append(owner, [LogEntry(version=1, fields={"at": b"0"})])
        with redis.paused():
            await store.close()


def test_sentinels_and_a_failover(
    tmp_path: Path, guard: Guard, entering: dict[str, Any], sentinel_password: dict[str, Any]
) -> None:
    with watched(tmp_path, guard) as (master, replica, sentinel):
        url = f"rediss+sentinel://127.0.0.1:{sentinel.port}/policies"
        with serve(redis_url=url, redis_wait_replicas=1, **entering, **sentinel_password) as server:
            assert train(server, 5) == 5
            server.stop()
        with serve(redis_url=url, **entering, **sentinel_password) as server:
            assert train(server, 1) == 6
            with replica.client() as client:
                (log,) = client.keys("equipoise:{p}:*:log")
                until(lambda: client.xinfo_stream(log)["last-generated-id"] == b"6-0", what="the replica has it")
            master.kill()
            assert train(server, 5) == 11
            with replica.client() as client:
                assert client.info("replication")["role"] == "master"
            assert_no_secret(server)


def test_a_cluster(tmp_path: Path, guard: Guard, entering: dict[str, Any]) -> None:
    with running_cluster(tmp_path / "cluster", masters=2, guard=guard) as nodes:
        for node in nodes:
            add_user(node, "+cluster|slots", "+command")
        url = f"rediss+cluster://127.0.0.1:{nodes[0].port}"
        with serve(redis_url=url, redis_wait_replicas=1, **entering) as server:
            for policy in ("a", "b", "c", "d", "e", "f"):
                assert train(server, 2, policy=policy) == 2
            assert_no_secret(server)
            server.restart()
            assert train(server, 1, policy="a") == 3
        for node in nodes[:2]:
            with node.client() as client:
                assert client.keys("equipoise:{*:spec")  # both have some


WRONG = {
    "another authority": "certificate verify failed",
    "no certificate": "certificate required",
    "plain text": "",
    "a wrong password": "auth",
    "a wrong password of the sentinel": "auth",
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_once_and_no_secret(
    tmp_path: Path, guard: Guard, entering: dict[str, Any], sentinel_password: dict[str, Any], what: str
) -> None:
    scheme = "rediss"
    match what:
        case "another authority":
            entering["redis_tls_ca"] = Authority(tmp_path, "stranger").file
        case "no certificate":
            del entering["redis_tls_certificate"], entering["redis_tls_key"]
        case "plain text":
            scheme = "redis"
            entering = {name: value for name, value in entering.items() if "tls" not in name}
        case "a wrong password":
            (tmp_path / "password").write_text(ADMIN_PASSWORD)
        case "a wrong password of the sentinel":
            (tmp_path / "sentinel-password").write_text(USER_PASSWORD)
    with watched(tmp_path, guard) as (_, _, sentinel):
        url = f"{scheme}+sentinel://127.0.0.1:{sentinel.port}/policies"
        with serve(redis_url=url, **entering, **sentinel_password) as server:
            until(lambda: "redis cannot be used" in server.log, what="it is said")
            until(lambda: WRONG[what] in not_ready(server), what=lambda: not_ready(server))
            asked = sum("redis cannot be used" in line for line in server.log.splitlines())
            assert asked == 1
            assert_no_secret(server)
