"""Envoy and HAProxy as we configure them: the real programs carry steps, and know policies by their header."""

import itertools
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import yaml

from equipoise import PolicyClient, Source
from equipoise.channel import POLICY_HEADER
from equipoise.v1 import policy_pb2 as pb
from equipoise.v1.policy_pb2_grpc import PolicyServiceStub
from tests import wheels
from tests.debian import Program, program
from tests.deploy.rendered import DEPLOY
from tests.e2e.faults.house import House
from tests.e2e.faults.proxy import until
from tests.e2e.faults.zygote import ForkedServer
from tests.e2e.watched import page, series
from tests.ports import free_port
from tests.servers import zygote

ENVOY, HAPROXY = DEPLOY / "routing" / "envoy.yaml", DEPLOY / "routing" / "haproxy.cfg"
SERVERS = 3
POLICIES = [f"policy-{number}" for number in range(12)]
CALLS = 4
WHAT = "a step through it"


def envoy() -> Program:
    return wheels.envoy(what=WHAT)


def haproxy() -> Program:
    return program("haproxy", package="haproxy", what=WHAT)


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


def port(address: str) -> int:
    return int(address.rpartition(":")[2])


def envoy_before(servers: Sequence[ForkedServer], folder: Path, listen: int) -> list[str | Path]:
    """The command that runs our Envoy, pointed at the test's servers."""
    config = yaml.safe_load(ENVOY.read_text(encoding="utf-8"))
    config["admin"]["address"]["socket_address"]["port_value"] = free_port()
    [listener], [cluster] = config["static_resources"]["listeners"], config["static_resources"]["clusters"]
    listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": listen}
    [there] = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    assert there["endpoint"]["address"]["socket_address"] == {"address": "equipoise-pods", "port_value": 50051}
    cluster["load_assignment"]["endpoints"][0]["lb_endpoints"] = [
        {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port(server.address)}}}}
        for server in servers
    ]
    (folder / "envoy.yaml").write_text(yaml.safe_dump(config))
    return [envoy().path, "--config-path", folder / "envoy.yaml", "--disable-hot-restart", "--concurrency", "1"]


def haproxy_before(servers: Sequence[ForkedServer], folder: Path, listen: int) -> list[str | Path]:
    """The command that runs our HAProxy, pointed at the test's servers."""
    text = HAPROXY.read_text(encoding="utf-8").replace("bind :50050", f"bind 127.0.0.1:{listen}")
    [template] = re.findall(r"^  server-template .*$", text, re.MULTILINE)
    options = re.sub(
        r"^  server-template \S+ \d+ equipoise-pods:50051 | resolvers dns init-addr none| port 9464", "", template
    )
    lines = [
        f"  server s{number} 127.0.0.1:{port(server.address)} {options} port {port(server.metrics_address)}"
        for number, server in enumerate(servers)
    ]
    (folder / "haproxy.cfg").write_text(text.replace(template, "\n".join(lines)))
    return [haproxy().path, "-f", folder / "haproxy.cfg"]


@contextmanager
def running(command: Sequence[str | Path], servers: Sequence[ForkedServer], folder: Path, listen: int) -> Iterator[str]:
    """The proxy's address, once it lets calls through to every server."""
    environment = (haproxy() if "haproxy" in str(command[0]) else envoy()).full_environment
    log = folder / "proxy.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    address = f"127.0.0.1:{listen}"
    earlier = [taken(server) for server in servers]
    names = (f"early-{number}" for number in itertools.count())

    def all_reached() -> bool:
        asked(address, next(names))
        return all(taken(server) > before for server, before in zip(servers, earlier, strict=True))

    try:
        until(all_reached, what=lambda: log.read_text()[-2000:])
        yield address
    finally:
        process.terminate()
        process.wait(30)


def asked(address: str, policy: str) -> grpc.StatusCode:
    """What became of asking for a policy that there is not."""
    request, metadata = pb.GetPolicyRequest(policy=policy), [(POLICY_HEADER, policy)]
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as refused:
        PolicyServiceStub(channel).GetPolicy(request, metadata=metadata, timeout=20)
    code: grpc.StatusCode = refused.value.code()
    return code


def taken(server: ForkedServer) -> int:
    """How many GetPolicy calls a server has answered, whatever it said."""
    text = page(server.metrics_address, "/metrics")[1]
    counts = re.findall(r'^grpc_server_started_total\{grpc_method="GetPolicy".*\} (\S+)$', text, re.MULTILINE)
    return sum(int(float(count)) for count in counts)


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
    before: Callable[[Sequence[ForkedServer], Path, int], list[str | Path]], servers: list[ForkedServer], tmp_path: Path
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


def sent_on(server: ForkedServer) -> float:
    """How many calls a server has sent on to a policy's owner."""
    return series(server.metrics_address)['refusals_total{reason="NOT_OWNER"}']
