"""Processes forked beside a connected client, each case in processes of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from equipoise import PolicyClient, aio, forks
from equipoise.channel import Channels, Server
from equipoise.v1 import policy_pb2 as pb
from tests.client.scripted_server import ScriptedServer
from tests.client.test_client import until
from tests.patience import PATIENT
from tests.servers import ServerProcess, serve

PROOF_EPOCHS = 200

CONNECTED = """
import os, sys
from equipoise import PolicyClient, Timeout
patient = Timeout(step=60, connect=60)
client = PolicyClient(sys.argv[1], policy="run-7", num_examples=10, timeout=patient)
client.step([0], losses=[1.0])
"""

FORKS = """
for _ in range(2):
    if not (child := os.fork()):
        os._exit(0)
    os.waitpid(child, 0)
client.close()
"""

CHILD = """
import asyncio
from equipoise import PolicyAdmin, aio
def told(call):
    try:
        return str(call())
    except Exception as error:
        return type(error).__name__
async def read():
    async with aio.PolicyClient(sys.argv[1], policy="run-7") as client:
        await client.read([0])
if not (child := os.fork()):
    calls = {
        "step": lambda: client.step([0], losses=[1.0]),
        "submit": lambda: client.submit([0], losses=[1.0]),
        "weights": lambda: client.weights([0]),
        "status": client.status,
        "stats": lambda: client.stats,
        "a new client": lambda: PolicyClient(sys.argv[1], policy="run-7").read([0]),
        "a new admin": lambda: PolicyAdmin(sys.argv[1]).get("run-7"),
        "a new asyncio client": lambda: asyncio.run(read()),
        "close": client.close,
    }
    for name, call in calls.items():
        print(name, told(call), sep=": ", flush=True)
    os._exit(0)
os.waitpid(child, 0)
print("the parent:", client.step([0], losses=[1.0]).source, flush=True)
client.close()
"""


def run(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A Python of its own, which has not imported gRPC. The warnings are those of others, about many workers."""
    inherited = {name: value for name, value in os.environ.items() if name != forks.VARIABLE}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        env=inherited | (environment or {}),
        capture_output=True,
        text=True,
        timeout=600,
    )


def connections(port: int) -> int:
    """How many connections this process has made to a port."""
    return sum(bool(c.raddr) and c.raddr.port == port for c in psutil.Process().net_connections("tcp"))


@pytest.mark.parametrize("persistent", [[], ["--persistent"]])
def test_workers_of_a_loader_neither_crash_nor_say_anything(server: ScriptedServer, persistent: list[str]) -> None:
    done = run("-m", "tests.client.epochs", server.address, "--epochs", "10", *persistent)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["outages"] == 0


@pytest.fixture(scope="module")
def service() -> Iterator[ServerProcess]:
    with serve() as process:
        yield process


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [[], ["--sampler"]])
@pytest.mark.parametrize("workers", ["0", "2", "4", "2 --persistent", "4 --persistent"])
def test_workers_of_a_loader_live_through_many_epochs(service: ServerProcess, workers: str, sampler: list[str]) -> None:
    epochs = str(PROOF_EPOCHS)
    done = run(
        "-m", "tests.client.epochs", service.address, "--epochs", epochs, "--workers", *workers.split(), *sampler
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["applied"] == 1 + PROOF_EPOCHS * 8


@pytest.mark.parametrize(
    ("first", "environment", "warned"),
    [
        ("import equipoise", {}, False),
        ("import grpc", {}, True),
        ("import grpc", {forks.VARIABLE: "0"}, False),
        ("import grpc", {forks.VARIABLE: "False"}, False),
        ("import equipoise", {forks.VARIABLE: "1"}, True),
    ],
)
def test_a_fork_that_may_go_wrong_is_told_once(
    server: ScriptedServer, first: str, environment: dict[str, str], warned: bool
) -> None:
    done = run("-c", f"{first}\n{CONNECTED}{FORKS}", server.address, environment=environment)
    assert done.stderr.count(forks.ADVICE) == warned
    assert warned or not done.stderr


def test_without_a_connection_a_fork_is_nobodys_business(server: ScriptedServer) -> None:
    unconnected = CONNECTED.replace("client.step", "0 and client.step")
    done = run("-c", f"import grpc\n{unconnected}{FORKS}", server.address)
    assert (done.returncode, done.stderr) == (0, "")


def test_in_a_child_of_a_connected_process_every_call_says_what_is_wrong(server: ScriptedServer) -> None:
    done = run("-c", CONNECTED + CHILD, server.address)
    *told, closed, parent = done.stdout.splitlines()
    assert {line.split(": ")[1] for line in told} == {"ForkError"}
    assert len(told) == 8
    assert (closed, parent) == ("close: None", "the parent: served")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_child_that_is_forked_before_the_first_call_is_a_trainer_of_its_own(server: ScriptedServer) -> None:
    code = """
import os, sys
from equipoise import PolicyClient, Timeout
patient = Timeout(step=60, connect=60)
client = PolicyClient(sys.argv[1], policy="run-7", num_examples=10, trainer_id="parent", timeout=patient)
child = os.fork()
said = f"{client.step([0], losses=[1.0]).source} {client.trainer_id == 'parent'}\\n"
os.write(1, said.encode())  # the two share a pipe, and print may write a line in pieces
client.close()
if child:
    os.waitpid(child, 0)
"""
    done = run("-c", code, server.address)
    assert sorted(done.stdout.splitlines()) == ["served False", "served True"]
    assert (done.returncode, done.stderr) == (0, "")
    assert len(server.memory.applied) == 2


def test_a_client_has_one_connection_whatever_it_is_asked(server: ScriptedServer) -> None:
    with PolicyClient(server.address, policy="run-7", num_examples=10, timeout=PATIENT) as client:
        client.step([0], losses=[1.0])
        client.status()
        client.read_weights()
        with client.admin as admin:
            list(admin.list_policies("x"))
        assert client.status().version == 1
        assert connections(server.port) == 1


async def test_an_asyncio_client_has_one_connection_whatever_it_is_asked(server: ScriptedServer) -> None:
    async with aio.PolicyClient(server.address, policy="run-7", num_examples=10, timeout=PATIENT) as client:
        await client.step([0], losses=[1.0])
        await client.status()
        await client.read_weights()
        async with client.admin as admin:
            assert [policy async for policy in admin.list_policies("x")]
        assert (await client.status()).version == 1
        assert connections(server.port) == 1


def test_a_connection_that_nobody_uses_any_more_is_closed(server: ScriptedServer) -> None:
    other = ScriptedServer()
    here, there = Server.at(server.address, None), Server.at(other.address, None)
    channels = Channels()
    try:
        with channels.stub(here) as first, channels.stub(there) as second:
            for stub in (first, second):
                stub.GetServerInfo(pb.GetServerInfoRequest())
            assert (connections(server.port), connections(other.port)) == (1, 1)
        with channels.stub(there):
            until(lambda: connections(server.port) == 0)
            assert connections(other.port) == 1
        channels.close()
        until(lambda: connections(other.port) == 0)
    finally:
        other.kill()
