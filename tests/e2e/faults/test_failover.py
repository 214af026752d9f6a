"""A Redis with a replica and three Sentinels: its master dies, and may take the last writes with it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

import numpy as np
import pytest
import redis

from equipoise import PolicyClient, Timeout
from tests.e2e.faults.aftermath import assert_all_is_well
from tests.e2e.faults.figures import record, seconds
from tests.e2e.faults.house import House
from tests.e2e.faults.proxy import FaultProxy, until
from tests.e2e.faults.redis_server import RedisServer, Sentinel
from tests.e2e.faults.training import Training
from tests.e2e.faults.zygote import ForkedServer

DOWN_AFTER_MS = 1000
PATIENT = Timeout(step=10.0)
"""A step is answered without Redis, on a busy machine too."""


@dataclass
class Replicated:
    """A master, its replica (which follows it through a proxy), and the Sentinels' URL."""

    master: RedisServer
    replica: RedisServer
    between: FaultProxy
    url: str


@pytest.fixture
def replicated(tmp_path: Path) -> Iterator[Replicated]:
    master, replica = RedisServer(tmp_path / "master"), RedisServer(tmp_path / "replica")
    sentinels = []
    master.start()
    replica.start()
    with FaultProxy(("127.0.0.1", master.port)) as between:
        try:
            replica.command("REPLICAOF", "127.0.0.1", between.port)
            until(lambda: b"state=online" in info(master), what="the replica follows")
            sentinels += [
                Sentinel(tmp_path / f"sentinel-{n}", master_port=master.port, quorum=2, down_after_ms=DOWN_AFTER_MS)
                for n in range(3)
            ]
            for sentinel in sentinels:
                sentinel.start()
            for sentinel in sentinels:
                until(lambda s=sentinel: knows_all(s), what="a Sentinel knows the replica and the others")  # type: ignore[misc]
            hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in sentinels)
            yield Replicated(master, replica, between, f"redis+sentinel://{hosts}/policies/0")
        finally:
            for process in (*sentinels, replica, master):
                process.kill()


def info(server: RedisServer) -> bytes:
    """Its replication, as text."""
    with redis.Redis(host="127.0.0.1", port=server.port) as client:
        facts = client.info("replication")
    return repr(facts).replace("'", "").replace(": ", "=").encode()


def knows_all(sentinel: RedisServer) -> bool:
    with redis.Redis(host="127.0.0.1", port=sentinel.port) as client:
        facts = client.execute_command("SENTINEL", "MASTER", "policies")
    if isinstance(facts, list):
        facts = dict(zip(facts[::2], facts[1::2], strict=True))
    named = {_text(key): _text(value) for key, value in facts.items()}
    return (named["num-slaves"], named["num-other-sentinels"]) == ("1", "2")


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def train_through_a_failover(
    house: House, replicated: Replicated, tmp_path: Path, *, lost_s: float
) -> tuple[ForkedServer, str, dict[str, str]]:
    """Kills the master under a training loop; with `lost_s`, after so long without replication."""
    server, before = house.serve(redis_url=replicated.url)
    with Training(before.address, timeout=PATIENT) as training:
        training.wait_until_durable()
        if lost_s:
            replicated.between.hold()
            sleep(lost_s)
        killed = monotonic()
        replicated.master.kill()
        replicated.between.reset()
        recovered = training.wait_until_durable()
        seen, noticed = training.since(killed), training.first_not_durable(killed)
    assert seen.unserved == 0
    assert_all_is_well(training, before.address, tmp_path)
    with PolicyClient(before.address, policy="p", when_lost="wait") as client:
        assert client.flush(30, durable=True)
        weights, version = client.read_weights(), client.status().version
        server.kill()
        server.start()
        client.read([0])
        np.testing.assert_array_equal(client.read_weights(), weights)
        assert client.status().version == version
    figures = {"noticed": seconds(noticed), "recovered": seconds(recovered), "trainer": str(seen)}
    return server, before.address, figures


@pytest.mark.slow
def test_a_failover(house: House, replicated: Replicated, tmp_path: Path) -> None:
    _, _, figures = train_through_a_failover(house, replicated, tmp_path, lost_s=0.0)
    record(
        "Redis fails over (replica, three Sentinels, down after 1 s)",
        promise="training goes on; steps are durable again on the new master",
        **figures,
    )


@pytest.mark.slow
def test_a_failover_that_loses_the_last_writes_is_repaired_from_memory(
    house: House, replicated: Replicated, tmp_path: Path
) -> None:
    server, _, figures = train_through_a_failover(house, replicated, tmp_path, lost_s=1.0)
    assert "redis went back" in server.log
    record(
        "Redis fails over and loses the last second of writes",
        promise="noticed at the next append, repaired from the owner's tail of the log",
        **figures,
    )
