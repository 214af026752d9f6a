"""A failover inside Redis: what is lost by it, and what is not where steps wait for replicas."""

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from equipoise import PolicyAdmin, PolicyClient
from equipoise.errors import UnavailableError
from tests.e2e.faults.gauges import not_ready, store_errors
from tests.e2e.faults.proxy import FaultProxy, until
from tests.e2e.faults.redis_server import RedisServer, following, running, running_cluster
from tests.servers import ServerProcess, serve

pytestmark = pytest.mark.slow  # they wait for failovers


@pytest.fixture
def master(tmp_path: Path) -> Iterator[RedisServer]:
    with running(tmp_path / "master") as server:
        yield server


def client_of(server: ServerProcess) -> PolicyClient:
    return PolicyClient(server.address, policy="p", num_examples=4, trainer_id="t", when_lost="continue")


def step(client: PolicyClient) -> None:
    client.step([0, 1], contributions=[1.0, -1.0])


def version_after_failover(replica: RedisServer) -> int:
    """Version of the policy on what was a replica."""
    replica.command("REPLICAOF", "NO", "ONE")
    found: list[int] = []
    with serve(redis_url=replica.url) as server, PolicyAdmin(server.address) as admin:

        def there() -> bool:
            with suppress(UnavailableError):  # the server that died owns it for some seconds more
                found.append(admin.get("p").version)
            return bool(found)

        until(there, what="the policy is back")
    return found[0]


@pytest.mark.parametrize("wait_replicas", [0, 1])
def test_what_is_durable_survives_the_master_where_it_waits_for_a_replica(
    master: RedisServer, tmp_path: Path, wait_replicas: int
) -> None:
    """Replication stands still, as behind a slow network; then master and server die together."""
    with (
        FaultProxy(("127.0.0.1", master.port)) as network,
        following(master, tmp_path / "replica", port=network.port) as replica,
    ):
        with serve(redis_url=master.url, redis_wait_replicas=wait_replicas) as server, client_of(server) as client:
            for _ in range(3):
                step(client)
            assert client.flush(30, durable=True)
            network.hold()
            for _ in range(5):
                step(client)  # none of them waits for ever
            reached = client.flush(2, durable=True)
            with master.client() as asking:
                (log,) = asking.keys("*:log")
                until(lambda: asking.xlen(log) == 8, what="the master has them all")
            assert reached == (wait_replicas == 0)
            if wait_replicas:
                assert store_errors(server, "replicas") > 0
            master.kill()
            server.kill()
        network.reset()
        # Without the setting five steps are lost that were called durable: README says so.
        assert version_after_failover(replica) == 3


def test_steps_are_durable_once_the_replica_has_them(master: RedisServer, tmp_path: Path) -> None:
    with following(master, tmp_path / "replica") as replica:
        with serve(redis_url=master.url, redis_wait_replicas=1) as server, client_of(server) as client:
            with replica.paused():
                for _ in range(3):
                    step(client)
                assert not client.flush(1, durable=True)
            assert client.flush(30, durable=True)
            master.kill()
            server.kill()
        assert version_after_failover(replica) == 3


@pytest.mark.slow
def test_what_waited_for_a_replica_is_not_durable_to_the_next_server_either(
    master: RedisServer, tmp_path: Path
) -> None:
    """What the master alone has must not become durable by being loaded."""
    with (
        following(master, tmp_path / "replica") as replica,
        serve(redis_url=master.url, redis_wait_replicas=1, owner_timeout_s=0.5) as first,
        client_of(first) as client,
    ):
        step(client)
        assert client.flush(30, durable=True)
        with replica.paused():
            step(client)
            assert not client.flush(1, durable=True)
            first.kill()
            with serve(redis_url=master.url, redis_wait_replicas=1) as second:
                with client_of(second) as other:
                    step(other)
                    assert not other.flush(2, durable=True)
                os.kill(replica.pid, signal.SIGCONT)
                with client_of(second) as other:
                    step(other)
                    assert other.flush(60, durable=True)


def test_a_server_is_not_ready_before_the_replicas_are_there(master: RedisServer, tmp_path: Path) -> None:
    with serve(redis_url=master.url, redis_wait_replicas=1) as server:
        until(lambda: "0 of the 1 replicas" in not_ready(server), what="readiness says so")
        with following(master, tmp_path / "replica"):
            until(lambda: not not_ready(server), what="the server is ready")


def test_a_cluster_waits_for_replicas_too(tmp_path: Path) -> None:
    with running_cluster(tmp_path, masters=1) as (master, replica):
        url = master.url.replace("redis://", "redis+cluster://")
        with serve(redis_url=url, redis_wait_replicas=1) as server, client_of(server) as client:
            step(client)
            assert client.flush(30, durable=True)
            with replica.paused():
                step(client)
                assert not client.flush(1, durable=True)
            assert client.flush(30, durable=True)
