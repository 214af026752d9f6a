"""A real server process, and the client against it."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from time import monotonic, sleep

import numpy as np
import pytest

from equipoise import PolicyClient, Source, errors
from equipoise.testing import ServerProcess, serve
from tests.patience import PATIENT
from tests.ports import free_port


@pytest.fixture(scope="module")
def process() -> Iterator[ServerProcess]:
    addresses = {name: f"127.0.0.1:{free_port()}" for name in ("listen", "metrics_listen")}  # it comes back to them
    with serve(device="cpu", **addresses) as running:
        yield running


def run(client: PolicyClient, process: ServerProcess, *, kill_at: int | None) -> np.ndarray:
    generator = np.random.default_rng(7)
    for number in range(40):
        if number == kill_at:
            process.restart()
        client.step(generator.integers(0, 100, 16), contributions=generator.normal(size=16), step=number)
    return client.read_weights()


def test_a_killed_run_ends_as_one_that_was_not(process: ServerProcess) -> None:
    address = process.address
    weights = []
    for name, kill_at in (("unkilled", None), ("killed", 20)):
        with PolicyClient(process.address, policy=name, num_examples=100, when_lost="wait", timeout=PATIENT) as client:
            weights.append(run(client, process, kill_at=kill_at))
            assert client.status().version == 40
    assert process.address == address
    assert weights[0].tobytes() == weights[1].tobytes()
    assert weights[0].std() > 0.1


def test_a_paused_server_does_not_stop_training(process: ServerProcess) -> None:
    timeout = replace(PATIENT, step=1.0, close=2.0)
    with PolicyClient(process.address, policy="paused", num_examples=10, timeout=timeout) as client:
        assert client.step([1], contributions=[1.0]).source is Source.SERVED
        process.pause()
        try:
            start = monotonic()
            sources = {client.step([1], contributions=[1.0]).source for _ in range(50)}
            assert sources == {Source.STALE}
            assert monotonic() - start < 40.0  # 50 s if each waited
        finally:
            process.resume()
        assert client.flush(60, durable=True)
        assert client.status().version == 51


@pytest.mark.slow
def test_a_server_that_falls_silent_is_noticed_by_keepalive_alone(process: ServerProcess) -> None:
    with PolicyClient(process.address, policy="silent", num_examples=10) as client:
        client.step([1], contributions=[1.0])
        process.pause()
        try:
            end = monotonic() + 4 * 15.0
            pause = threading.Event()
            while not client.stats.outages:
                assert monotonic() < end
                pause.wait(0.05)
        finally:
            process.resume()


def test_a_server_that_cannot_start_says_why() -> None:
    with pytest.raises(errors.UnavailableError, match=r"no_such_setting|no-such-setting"), serve(no_such_setting=1):
        pass


STARTER = """
import signal
from equipoise.testing import serve
with serve() as server:
    print(server.pid, flush=True)
    signal.pause()
"""


def test_a_server_ends_with_a_process_that_was_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", STARTER], stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None
        server = int(starter.stdout.readline())
        assert _runs(server)
        starter.send_signal(signal.SIGKILL)
        starter.wait()
    end = monotonic() + 60
    while _runs(server):
        assert monotonic() < end, "the server outlives the process that started it"
        sleep(0.05)


def _runs(pid: int) -> bool:
    """Whether there is such a process that has not ended (one that nobody has waited for has, too)."""
    status = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return bool(status.stdout.strip()) and not status.stdout.strip().startswith("Z")
