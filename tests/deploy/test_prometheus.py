"""A real Prometheus reads the server's metrics with the configuration that we ship."""

import json
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from equipoise import PolicyClient
from equipoise.testing import ServerProcess, serve

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "deploy" / "prometheus" / "prometheus.yml"
SHIPPED_TARGET = "127.0.0.1:9464"
NOT_TO_BE_HAD = 3
PATIENCE_S = 60.0

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def programs() -> Path:
    """Folder of prometheus and promtool."""
    script = Path(__file__).with_name("fetch-prometheus")
    fetched = subprocess.run([script], capture_output=True, text=True, check=False)
    if fetched.returncode == NOT_TO_BE_HAD:
        pytest.skip(f"Debian's prometheus cannot be had here: {fetched.stderr[-200:]}")
    assert fetched.returncode == 0, fetched.stderr
    return Path(fetched.stdout.strip())


@pytest.fixture
def server() -> Iterator[ServerProcess]:
    """A server with a policy `seen` that has taken five steps."""
    with serve() as process:
        with PolicyClient(process.address, policy="seen", num_examples=10) as client:
            for _ in range(5):
                client.step(np.arange(10), contributions=np.arange(10) - 2.0, target_loss=0.5)
        yield process


@pytest.fixture
def prometheus(programs: Path, server: ServerProcess, tmp_path: Path) -> Iterator[str]:
    """URL of a Prometheus that runs our configuration, pointed at the test's server and in a hurry."""
    text = CONFIG.read_text(encoding="utf-8")
    assert SHIPPED_TARGET in text
    config = tmp_path / "prometheus.yml"
    text = text.replace(SHIPPED_TARGET, server.metrics_address).replace("interval: 15s", "interval: 1s")
    config.write_text(text, encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = [f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'tsdb'}", f"--web.listen-address={address}"]
    with (tmp_path / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([programs / "prometheus", *flags], stdout=log, stderr=log)
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(30)


def until(condition: Any, what: str) -> Any:
    """Asks until the answer is true, and returns it."""
    deadline = time.monotonic() + PATIENCE_S
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"not in {PATIENCE_S:.0f} s: {what}"
        time.sleep(0.1)
    return answer


def queried(url: str, query: str) -> list[dict[str, Any]]:
    try:
        with urllib.request.urlopen(f"{url}/api/v1/query?{urllib.parse.urlencode({'query': query})}") as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
            return found
    except OSError:  # it is starting
        return []


def value(url: str, query: str) -> float:
    [series] = until(lambda: queried(url, query), query)
    return float(series["value"][1])


def test_the_configuration_is_valid(programs: Path) -> None:
    subprocess.run([programs / "promtool", "check", "config", CONFIG], check=True)


def test_the_metrics_follow_prometheus_own_rules(programs: Path, server: ServerProcess) -> None:
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics") as answer:
        text = answer.read()
    checked = subprocess.run([programs / "promtool", "check", "metrics"], input=text, capture_output=True, check=False)
    complaints = [line for line in checked.stderr.decode().splitlines() if not line.startswith("python_gc_")]
    assert complaints == []


def test_prometheus_knows_the_policy(prometheus: str) -> None:
    assert value(prometheus, 'up{job="equipoise"}') == 1
    assert value(prometheus, 'equipoise_server_policy_version{policy="seen"}') == 5
    assert value(prometheus, 'equipoise_server_updates_total{policy="seen",result="applied"}') == 5
    assert value(prometheus, 'equipoise_server_target_loss{policy="seen"}') == 0.5
    assert 0 < value(prometheus, 'equipoise_server_weight_effective_examples_ratio{policy="seen"}') < 1
    assert value(prometheus, 'sum(grpc_server_started_total{grpc_method="Exchange"})') >= 1
    assert value(prometheus, "equipoise_server_redis_up") == 1
