"""Envoy and HAProxy as we configure them, before servers of this machine."""

import itertools
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import grpc
import pytest
import yaml

from equipoise.channel import POLICY_HEADER
from equipoise.v1 import policy_pb2 as pb
from equipoise.v1.policy_pb2_grpc import PolicyServiceStub
from tests import wheels
from tests.debian import Program, program
from tests.deploy.rendered import DEPLOY
from tests.e2e.faults.proxy import until
from tests.e2e.faults.zygote import ForkedServer
from tests.e2e.watched import page
from tests.ports import free_port

ENVOY, HAPROXY = DEPLOY / "routing" / "envoy.yaml", DEPLOY / "routing" / "haproxy.cfg"
WHAT = "a step through it"

Before: TypeAlias = Callable[[Sequence[ForkedServer], Path, int], list[str | Path]]
"""Makes the command that runs a proxy before servers: with its files in a folder, listening on a port."""


def envoy() -> Program:
    return wheels.envoy(what=WHAT)


def haproxy() -> Program:
    return program("haproxy", package="haproxy", what=WHAT)


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
