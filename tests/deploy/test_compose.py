"""`deploy/compose.yaml`: what it names is there, and it comes up: a trainer trains, and Prometheus sees it.

The images of Redis, Prometheus and Alertmanager are made of Debian's packages here, as registries may be out of reach;
Grafana has no such package, and is not started.
"""

import json
import shutil
import sys
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from equipoise_server.settings import load
from tests.deploy.containers import NOT_RUN, Containers
from tests.deploy.rendered import DEPLOY
from tests.e2e.faults.proxy import until
from tests.ports import free_port

COMPOSE = DEPLOY / "compose.yaml"
STACK = "localhost/equipoise-test:stack"
PROGRAMS = {"redis": "redis-server", "prometheus": "prometheus", "alertmanager": "prometheus-alertmanager"}


@pytest.fixture
def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]
    return found


def test_the_server_understands_its_variables(services: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in services["server"]["environment"].items():
        monkeypatch.setenv(name, value)
    found = load([])
    assert found.listen == f":{services['server']['ports'][0].rpartition(':')[2]}"
    [scraped] = yaml.safe_load((DEPLOY / "compose" / "prometheus.yml").read_text())["scrape_configs"]
    assert scraped["static_configs"][0]["targets"] == [f"server{found.metrics_listen}"]
    assert float(services["server"]["stop_grace_period"].removesuffix("s")) > found.drain_grace_s + 2 * 10


def test_what_is_mounted_is_there_and_every_port_is_this_machine_s_alone(services: dict[str, Any]) -> None:
    written_by_others = {"./prometheus/rules", "./grafana/dashboards"}
    for service in services.values():
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            assert not source.startswith(".") or source in written_by_others or (DEPLOY / source).exists(), source
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


@pytest.fixture(scope="module")
def stack(containers: Containers, base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image with the programs that the registries' images would hold."""
    folder = tmp_path_factory.mktemp("stack")
    packages = "redis-server prometheus prometheus-alertmanager"
    lines = [f"FROM {base}", "RUN apt-get update -q && apt-get install -y -q --no-install-recommends " + packages]
    (folder / "Containerfile").write_text("\n".join(lines) + "\n")
    command = ("buildah", "bud", "--layers", "--isolation", "chroot", "--network", "host", "--tag", STACK, folder)
    try:
        containers(*command, timeout_s=600)
    except AssertionError as error:
        pytest.skip(f"{NOT_RUN}Debian's packages cannot be had: {str(error)[-300:]}")
    return STACK


@pytest.fixture(scope="module")
def prometheus(
    containers: Containers, image: str, stack: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The stack's Prometheus, where this machine reaches it."""
    folder = tmp_path_factory.mktemp("compose") / "deploy"
    shutil.copytree(DEPLOY, folder)
    for others in ("prometheus/rules", "grafana/dashboards"):
        (folder / others).mkdir(parents=True, exist_ok=True)
    composed = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
    services = composed["services"]
    del services["grafana"]
    ports = {"server": free_port(), "prometheus": free_port(), "alertmanager": free_port()}
    for name, service in services.items():
        service.pop("build", None)
        service["image"] = stack if name in PROGRAMS else image
        if name in PROGRAMS:
            service["entrypoint"] = [PROGRAMS[name]]
            if name == "redis":
                service["command"] = service["command"][1:]  # its image has no entry point
            service["user"] = "root"
        if "ports" in service:
            service["ports"] = [f"127.0.0.1:{ports[name]}:{service['ports'][0].rpartition(':')[2]}"]
    file = folder / "compose.yaml"
    file.write_text(yaml.safe_dump(composed))
    compose = (sys.executable, "-m", "podman_compose", "--file", file, "--project-name", "equipoise-test")
    try:
        containers(*compose, "up", "--detach", timeout_s=300)
        yield f"http://127.0.0.1:{ports['prometheus']}"
    finally:
        containers(*compose, "down", "--volumes", "--timeout", "5", check=False, timeout_s=120)


def answer(url: str) -> Any:
    try:
        with urllib.request.urlopen(url, timeout=10) as page:
            return json.load(page)["data"]
    except OSError:  # it is starting
        return {}


@pytest.mark.slow
def test_a_trainer_trains_and_prometheus_sees_it(containers: Containers, prometheus: str) -> None:
    def versions() -> list[float]:
        found = answer(f"{prometheus}/api/v1/query?query=equipoise_server_policy_version%7Bjob%3D%22equipoise%22%7D")
        return [float(each["value"][1]) for each in found.get("result", [])]

    until(lambda: versions() and min(versions()) > 100, within_s=180, what=lambda: containers("podman", "ps", "--all"))
    until(lambda: answer(f"{prometheus}/api/v1/alertmanagers").get("activeAlertmanagers"))
    targets = answer(f"{prometheus}/api/v1/targets")["activeTargets"]
    assert [target["health"] for target in targets] == ["up"]
