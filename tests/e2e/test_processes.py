"""Several processes as one server: one port, exact steps, one `/metrics`, one signal to end, and one that dies."""

import json
import os
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from equipoise import PolicyAdmin, PolicyClient
from equipoise.errors import PolicyNotFoundError, UnavailableError
from equipoise_server.processes.child import MODULE
from tests.e2e.faults.gauges import gauges
from tests.e2e.faults.proxy import until
from tests.patience import PATIENT
from tests.ports import free_port
from tests.servers import ServerProcess, serve

POLICIES = tuple(f"p{number}" for number in range(8))
STEPS = 20


def several(**settings: Any) -> Any:
    return serve(processes=2, **{"listen": "127.0.0.1:0"} | settings)


def three_ports() -> int:
    """The first of three ports in a row that no other test gets."""
    while True:
        first, second, third = free_port(), free_port(), free_port()
        if (second, third) == (first + 1, first + 2):
            return first


def children(server: ServerProcess) -> list[psutil.Process]:
    return [each for each in psutil.Process(server.pid).children() if MODULE in each.cmdline()]


@contextmanager
def training(server: ServerProcess, *, num_steps: int = STEPS) -> Iterator[Any]:
    """A client for each policy; yields what lets all of them make steps, each in a thread, one after another."""
    with ExitStack() as stack:
        clients = [
            stack.enter_context(
                PolicyClient(
                    server.address, policy=name, num_examples=4, trainer_id="t", when_lost="wait", timeout=PATIENT
                )
            )
            for name in POLICIES
        ]
        pool = stack.enter_context(ThreadPoolExecutor(len(clients)))

        def work(client: PolicyClient, number: int) -> None:
            rng = np.random.default_rng(number)
            for _ in range(num_steps):
                client.step([0, 1, 2], contributions=rng.normal(size=3).astype(np.float32))

        yield lambda: [pool.submit(work, client, number) for number, client in enumerate(clients)]


def weights(server: ServerProcess) -> dict[str, list[float]]:
    found = {}
    for name in POLICIES:
        with PolicyClient(server.address, policy=name, when_lost="wait", timeout=PATIENT) as client:
            found[name] = client.read_weights().tolist()
    return found


def versions(server: ServerProcess) -> dict[str, int]:
    with PolicyAdmin(server.address, timeout=60) as admin:
        return {name: _version(admin, name) for name in POLICIES}


def page(server: ServerProcess, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{server.metrics_address}/{path}", timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def homes(server: ServerProcess) -> dict[str, int]:
    """Which process has loaded each policy last."""
    events = [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]
    return {event["policy"]: event["process"] for event in events if event["event"] == "loaded"}


def test_steps_are_exact_go_to_all_processes_and_are_counted_together() -> None:
    with serve() as alone:
        with training(alone) as start:
            for job in start():
                job.result()
        expected = weights(alone)
    with several() as server, training(server) as start:
        for job in start():
            job.result()
        assert versions(server) == dict.fromkeys(POLICIES, STEPS)
        assert weights(server) == expected  # bit for bit what one process answers
        until(lambda: list(homes(server).values()).count(0) == 4, what="both have their share")
        until(lambda: gauges(server)["policies"] == len(POLICIES), what="nothing moves")
        measured = gauges(server)
        assert measured["clients"] >= len(POLICIES)
        assert (measured["processes_running"], measured["processes_wanted"]) == (2, 2)
        for job in start():
            job.result()
        assert versions(server) == dict.fromkeys(POLICIES, 2 * STEPS)
        assert gauges(server)["batch_examples_sum"] - measured["batch_examples_sum"] == len(POLICIES) * STEPS * 3


def test_all_speak_for_the_server() -> None:
    with several() as server:
        until(lambda: page(server, "readyz") == (200, "ok\n"), what="they have reached Redis")
        assert page(server, "livez") == (200, "ok\n")
        asked = health_pb2.HealthCheckRequest(service="equipoise.v1.PolicyService")
        for _ in range(6):  # each connection meets one of the two
            with grpc.insecure_channel(server.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
                answer = health_pb2_grpc.HealthStub(channel).Check(asked, timeout=60)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
        first, _ = children(server)
        first.suspend()
        code, told = page(server, "livez")
        assert (code, "does not answer" in told) == (503, True)
        assert page(server, "readyz")[0] == 200  # the other one serves
        assert "equipoise_server_policies" in page(server, "metrics")[1]
        first.resume()
        until(lambda: page(server, "livez")[0] == 200, what="it answers again")


def test_nothing_acknowledged_is_lost_by_a_stop_under_load() -> None:
    with several(listen=f"127.0.0.1:{three_ports()}") as server, training(server) as start:
        jobs = start()
        until(lambda: sum(versions(server).values()) > 30, what="they train")
        assert server.stop() == 0
        assert server.log.count('"stopped"') == 3  # both and the parent
        server.start()
        for job in jobs:
            job.result()
        assert versions(server) == dict.fromkeys(POLICIES, STEPS)


def test_a_killed_process_is_replaced_and_its_policies_go_on() -> None:
    with several() as server, training(server, num_steps=60) as start:
        jobs = start()
        until(lambda: sum(versions(server).values()) > 30, what="they train")
        doomed, other = children(server)
        doomed.kill()
        assert page(server, "readyz")[0] == 200
        for job in jobs:
            job.result()
        assert versions(server) == dict.fromkeys(POLICIES, 60)
        until(lambda: gauges(server)["processes_running"] == 2, what="it is replaced")
        assert other in children(server)
        assert doomed not in children(server)
        assert gauges(server)["process_exits_total"] == 1


def test_processes_end_with_their_parent() -> None:
    with several() as server:
        pids = [child.pid for child in children(server)]
        assert len(pids) == 2
        os.kill(server.pid, signal.SIGKILL)
        until(lambda: not any(psutil.pid_exists(pid) for pid in pids), what="they have ended")
        server.kill()


def test_what_cannot_start_says_why_and_leaves_nobody(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text("nonsense")
    with pytest.raises(UnavailableError, match=r"(?s)tokens_file.*before all served"), several(tokens_file=tokens):
        pass
    assert not [each for each in psutil.process_iter() if str(tmp_path) in " ".join(_command(each))]


def test_a_port_that_is_taken_is_refused() -> None:
    refused = pytest.raises(UnavailableError, match=r"listen: .* cannot be bound")
    with several() as server, refused, several(listen=server.address):
        pass


def _version(admin: PolicyAdmin, name: str) -> int:
    try:
        return admin.get(name).version
    except PolicyNotFoundError:  # its trainer has not come yet
        return 0


def _command(process: psutil.Process) -> list[str]:
    try:
        command: list[str] = process.cmdline()
    except psutil.Error:
        return []
    return command
