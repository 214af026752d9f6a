"""The image is built and run as a cluster runs it: another user, no capabilities, a root that nobody can write."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from equipoise import PolicyClient, Source
from tests.deploy.containers import IMAGE, ROOT, Containers
from tests.e2e.faults.proxy import until
from tests.e2e.faults.redis_server import free_port, running
from tests.e2e.watched import page, series

MOST_MB = 575
"""What the image adds to its base, which has 75 MB where it is Debian's slim one: 650 MB together."""

PINNED = re.compile(r"[a-z0-9.-]+==[^\s=]+ --hash=sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Running:
    """A container that serves."""

    name: str
    address: str
    metrics_address: str
    redis_url: str


@contextmanager
def serving(containers: Containers, image: str, folder: Path) -> Iterator[Running]:
    """A container that serves, before a Redis in a folder."""
    port, metrics_port = free_port(), free_port()
    name = f"equipoise-test-{port}"
    with running(folder) as redis:
        found = Running(name, f"127.0.0.1:{port}", f"127.0.0.1:{metrics_port}", redis.url)
        restrictions = ("--read-only", "--cap-drop", "all", "--security-opt", "no-new-privileges", "--memory", "1g")
        settings = ("--listen", found.address, "--metrics-listen", found.metrics_address, "--redis-url", redis.url)
        containers("podman", "run", "--detach", "--log-driver", "k8s-file", "--name", name, "--network", "host",
                   *restrictions, image,
                   "serve", *settings)  # fmt: skip
        try:
            until(
                lambda: _ready(found) or not containers("podman", "ps", "--quiet", "--filter", f"name={name}"),
                within_s=120,
                what=lambda: f"it is ready: {containers.logs(name)}",
            )
            yield found
        finally:
            containers("podman", "rm", "--force", "--time", "0", name, check=False)


@pytest.fixture(scope="module")
def served(containers: Containers, image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(containers, image, tmp_path_factory.mktemp("redis")) as container:
        yield container


def _ready(server: Running) -> bool:
    try:
        return page(server.metrics_address, "/readyz")[0] == 200
    except OSError:
        return False


@pytest.mark.parametrize("flavour", ["build", "cpu", "cuda"])
def test_whatever_pip_installs_has_a_version_and_a_hash(flavour: str) -> None:
    first, *lines = (IMAGE / f"requirements-{flavour}.txt").read_text(encoding="utf-8").splitlines()
    assert first == f"# Written by lock.py {flavour}."
    assert lines == sorted(lines)
    assert [line for line in lines if not PINNED.fullmatch(line)] == []
    assert len({line.split("==")[0] for line in lines}) == len(lines)


def test_the_images_install_the_versions_that_the_project_is_tested_with() -> None:
    def versions(path: Path) -> dict[str, str]:
        pins = (line.split() for line in path.read_text(encoding="utf-8").splitlines() if "==" in line)
        return {name.lower().replace("_", "-"): version for name, version in (pin[0].split("==") for pin in pins)}

    tested = versions(ROOT / "constraints.txt")
    for flavour in ("cpu", "cuda"):
        installed = versions(IMAGE / f"requirements-{flavour}.txt")
        assert {"torch", "grpcio", "redis", "prometheus-client"} <= installed.keys()
        for name in installed.keys() & tested.keys():
            assert installed[name].partition("+")[0] == tested[name].partition("+")[0], name


@pytest.mark.slow
def test_it_serves_a_trainer_without_any_right(containers: Containers, served: Running) -> None:
    with PolicyClient(served.address, policy="p", num_examples=4, when_lost="wait") as client:
        assert client.step([0, 1], contributions=[1.0, -1.0]).source is Source.SERVED
        assert client.flush(30, durable=True)
    assert series(served.metrics_address)['updates_total{policy="p",result="applied"}'] == 1
    assert page(served.metrics_address, "/livez") == (200, "ok\n")
    status = containers("podman", "exec", served.name, "cat", "/proc/1/status")
    assert re.search(r"^Uid:\s+10001\s+10001", status, re.MULTILINE)
    assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE)
    assert not containers("podman", "exec", served.name, "touch", "/written", check=False)
    changed = containers("podman", "diff", served.name).splitlines()
    assert [line for line in changed if line.startswith("A") and "/equipoise" in line] == []


@pytest.mark.slow
def test_its_labels_user_and_size(containers: Containers, image: str, base: str) -> None:
    facts = json.loads(containers("podman", "image", "inspect", image))[0]
    labels = facts["Labels"]
    assert labels["org.opencontainers.image.version"] == "1.2.3"
    assert labels["org.opencontainers.image.revision"] == "abc"
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert facts["Config"]["User"] == "10001:10001"
    own = facts["Size"] - json.loads(containers("podman", "image", "inspect", base))[0]["Size"]
    assert own <= MOST_MB * 10**6


@pytest.mark.slow
def test_it_stops_in_order_when_it_is_told_to(containers: Containers, image: str, tmp_path: Path) -> None:
    """SIGTERM reaches the server, which is the container's first process."""
    with serving(containers, image, tmp_path / "redis") as container:
        containers("podman", "stop", "--time", "60", container.name, timeout_s=90)
        state = json.loads(containers("podman", "inspect", container.name))[0]["State"]
        assert state["ExitCode"] == 0
        assert '"event": "stopped"' in containers.logs(container.name)


@pytest.mark.slow
def test_its_bill_of_materials_has_whatever_was_installed(containers: Containers, served: Running) -> None:
    bill = json.loads(containers("podman", "exec", served.name, "cat", "/opt/equipoise/sbom.json"))
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.5")
    assert bill["metadata"]["component"]["name"] == "equipoise"
    listed = {f"{each['name']}=={each['version']}" for each in bill["components"] if each["type"] == "library"}
    pins = (IMAGE / "requirements-cpu.txt").read_text(encoding="utf-8").splitlines()[1:]
    cut = {"setuptools", "sympy", "mpmath", "networkx"}
    assert listed == {pin.split()[0] for pin in pins if pin.split("==")[0] not in cut}
