"""Envoy and HAProxy as we configure them: the real programs carry steps, and know policies by their header."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from equipoise import PolicyClient, Source
from tests.deploy.proxies import (
    ENVOY,
    HAPROXY,
    Before,
    asked,
    envoy,
    envoy_before,
    haproxy,
    haproxy_before,
    running,
    taken,
)
from tests.e2e.faults.house import House
from tests.e2e.faults.proxy import until
from tests.e2e.faults.zygote import ForkedServer
from tests.e2e.watched import page, series
from tests.ports import free_port
from tests.servers import zygote

SERVERS = 3
POLICIES = [f"policy-{number}" for number in range(12)]
CALLS = 4


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ForkedServer]]:
    """Servers on one Redis."""
    house = House(tmp_path_factory.mktemp("routing"), zygote())
    house.server.kill()  # it would share the policies in its own way
    found = [house.serve(spread_policies="false")[0] for _ in range(SERVERS)]
    for server in found:
        until(lambda server=server: page(server.metrics_address, "/readyz")[0] == 200)
    yield found
    house.close()


def test_envoy_takes_the_configuration() -> None:
    done = subprocess.run(
        [envoy().path, "--mode", "validate", "--config-path", ENVOY], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]


def test_haproxy_takes_the_configuration() -> None:
    found = haproxy()
    command = [found.path, "-c", "-f", HAPROXY]
    done = subprocess.run(command, env=found.full_environment, capture_output=True, text=True, check=False)
    assert (done.returncode, "WARNING" in done.stderr) == (0, False), done.stderr


@pytest.mark.parametrize("before", [envoy_before, haproxy_before], ids=["envoy", "haproxy"])
def test_every_call_of_a_policy_goes_to_one_server_and_none_is_sent_on(
    before: Before, servers: list[ForkedServer], tmp_path: Path
) -> None:
    listen = free_port()
    with running(before(servers, tmp_path, listen), servers, tmp_path, listen) as address:
        used = set()
        for policy in POLICIES:
            earlier = [taken(server) for server in servers]
            assert {asked(address, policy) for _ in range(CALLS)} == {grpc.StatusCode.NOT_FOUND}
            gained = [taken(server) - count for server, count in zip(servers, earlier, strict=True)]
            assert sorted(gained) == [0, 0, CALLS]
            used.add(gained.index(CALLS))
        assert len(used) > 1
        before_steps = [sent_on(server) for server in servers]
        for number in range(6):
            with PolicyClient(
                address, policy=f"p-{listen}-{number}", num_examples=8, rule="ema_sign", when_lost="wait"
            ) as client:
                for _ in range(10):
                    assert client.step([0, 1], contributions=[1.0, -1.0]).source is Source.SERVED
                assert client.flush(30, durable=True)
                assert client.status().version == 10
        assert [sent_on(server) for server in servers] == before_steps


@pytest.mark.parametrize("before", [envoy_before, haproxy_before], ids=["envoy", "haproxy"])
def test_policies_of_a_server_that_is_gone_go_to_the_others_also_right_after_the_proxy_s_start(
    before: Before, servers: list[ForkedServer], tmp_path: Path
) -> None:
    listen = free_port()
    with running(before(servers, tmp_path, listen), servers, tmp_path, listen) as address:
        servers[0].kill()
        try:
            until(lambda: {asked(address, policy) for policy in POLICIES} == {grpc.StatusCode.NOT_FOUND})
        finally:
            servers[0].start()


def sent_on(server: ForkedServer) -> float:
    """How many calls a server has sent on to a policy's owner."""
    return series(server.metrics_address)['refusals_total{reason="NOT_OWNER"}']
