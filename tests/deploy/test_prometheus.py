"""A real Prometheus reads the server's metrics with the configuration that we ship."""

import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from equipoise import PolicyClient
from tests.deploy.prometheus import programs, running, value
from tests.patience import PATIENT
from tests.servers import ServerProcess, serve

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "deploy" / "prometheus" / "prometheus.yml"
SHIPPED_TARGET = "127.0.0.1:9464"

pytestmark = pytest.mark.slow


@pytest.fixture
def server() -> Iterator[ServerProcess]:
    """A server with a policy `seen` that has taken five steps."""
    with serve() as process:
        with PolicyClient(process.address, policy="seen", num_examples=10, timeout=PATIENT) as client:
            for _ in range(5):
                client.step(np.arange(10), contributions=np.arange(10) - 2.0, target_loss=0.5)
        yield process


@pytest.fixture
def prometheus(server: ServerProcess, tmp_path: Path) -> Iterator[str]:
    """URL of a Prometheus that runs our configuration, pointed at the test's server and in a hurry."""
    text = CONFIG.read_text(encoding="utf-8")
    assert SHIPPED_TARGET in text
    config = tmp_path / "prometheus.yml"
    text = text.replace(SHIPPED_TARGET, server.metrics_address).replace("interval: 15s", "interval: 1s")
    config.write_text(text.replace("rules/", f"{CONFIG.parent}/rules/"), encoding="utf-8")
    with running(config, tmp_path) as url:
        yield url


def test_the_configuration_is_valid() -> None:
    subprocess.run([programs() / "promtool", "check", "config", CONFIG], check=True)


def test_the_metrics_follow_prometheus_own_rules(server: ServerProcess) -> None:
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics") as answer:
        text = answer.read()
    checked = subprocess.run(
        [programs() / "promtool", "check", "metrics"], input=text, capture_output=True, check=False
    )
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
