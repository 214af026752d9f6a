"""The rendered chart runs: its pod, as podman understands Kubernetes' objects, serves a trainer that shows a token.

podman knows no StatefulSets, no projected volumes, no variables within variables, and no probes over HTTP without
curl in the image. What the kubelet would make of the first three is made here, and the probes are asked from outside.
"""

import re
import shutil
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from redis import Redis

from equipoise import PolicyAdmin, PolicyClient, Security, Source
from equipoise.errors import AccessDeniedError
from tests.deploy.containers import Containers
from tests.deploy.rendered import Manifest, Objects, rendered
from tests.e2e.faults.proxy import until
from tests.e2e.faults.redis_server import RedisServer
from tests.e2e.security.authority import Authority
from tests.e2e.security.conftest import Tokens
from tests.e2e.watched import page, series

pytestmark = pytest.mark.slow

POD, GATEWAY, SUBNET = "10.99.51.10", "10.99.51.1", "10.99.51.0/24"
NETWORK = "equipoise-test"
PASSWORD = "not a word"
USER = 10001
PROBES = ("startupProbe", "livenessProbe", "readinessProbe")


@dataclass(frozen=True)
class Playing:
    """A pod that runs.

    Attributes:
        name: of its container.
        security: of a trainer that may come in.
        probes: what the kubelet would ask.
        volume: where the kubelet would put the Secrets.
    """

    name: str
    security: Security
    probes: dict[str, str]
    volume: Path
    tokens: Tokens

    @property
    def address(self) -> str:
        return f"{POD}:50051"

    @property
    def metrics_address(self) -> str:
        return f"{POD}:9464"


@pytest.fixture(scope="module")
def playing(containers: Containers, image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Playing]:
    folder = tmp_path_factory.mktemp("play")
    authority = Authority(folder)
    certificate = authority.issue("tls", host=POD)
    tokens = Tokens(folder / "tokens.toml")
    token = tokens.add("operator")
    (folder / "password").write_text(PASSWORD)
    secrets = {
        "equipoise-tls": {"tls.crt": certificate.certificate, "tls.key": certificate.key, "ca.crt": authority.file},
        "equipoise-tokens": {"tokens.toml": tokens.file},
        "equipoise-redis": {"password": folder / "password"},
    }
    redis = RedisServer(folder / "redis", bind="0.0.0.0", **{"protected-mode": "no"})
    containers("podman", "network", "create", "--subnet", SUBNET, NETWORK, check=False)
    objects = rendered(
        sets={
            "image": {"repository": image.partition(":")[0], "tag": image.partition(":")[2], "pullPolicy": "Never"},
            "redis.url": f"redis://redis:{redis.port}",
            "redis.existingSecret.name": "equipoise-redis",
            "tls.existingSecret": "equipoise-tls",
            "tokens.existingSecret": "equipoise-tokens",
        }
    )
    pod = as_pod(objects, secrets, folder / "volume")
    probes = {name: pod["spec"]["containers"][0].pop(name)["httpGet"]["path"] for name in PROBES}
    text = yaml.safe_dump_all([*objects.of("ConfigMap"), pod])
    (folder / "pod.yaml").write_text(text)
    try:
        redis.start()
        with Redis(host="127.0.0.1", port=redis.port) as known:
            known.config_set("requirepass", PASSWORD)
        containers("podman", "kube", "play", "--network", NETWORK, "--ip", POD, folder / "pod.yaml")
        found = Playing(
            "equipoise-0-server",
            Security(root_certificates=authority.file, token=token),
            probes,
            folder / "volume",
            tokens,
        )
        until(lambda: is_ready(found), within_s=120, what=lambda: containers.logs(found.name))
        yield found
    finally:
        containers("podman", "kube", "down", folder / "pod.yaml", check=False)
        containers("podman", "network", "rm", "--force", NETWORK, check=False)
        redis.kill()


def as_pod(objects: Objects, secrets: dict[str, dict[str, Path]], volume: Path) -> Manifest:
    """Pod 0 of the StatefulSet, with the Secrets where the kubelet puts them, and its group as their owner's."""
    template = deepcopy(objects.one("StatefulSet")["spec"]["template"])
    spec = template["spec"]
    [projected] = spec["volumes"]
    for source in projected["projected"]["sources"]:
        for item in source["secret"]["items"]:
            path = volume / item["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(secrets[source["secret"]["name"]][item["key"]], path)
            shutil.chown(path, 0, spec["securityContext"]["fsGroup"])
            path.chmod(projected["projected"]["defaultMode"])
    for part in (volume, *volume.parents[:2], *(each for each in volume.iterdir() if each.is_dir())):
        part.chmod(0o755)
    spec["volumes"] = [{"name": projected["name"], "hostPath": {"path": str(volume), "type": "Directory"}}]
    spec["hostAliases"] = [{"ip": GATEWAY, "hostnames": ["redis"]}]
    for each in spec["containers"][0]["env"]:
        each.pop("valueFrom", None)
        each["value"] = objects.settings[each["name"]]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "equipoise-0", **template["metadata"]},
        "spec": spec,
    }


def is_ready(pod: Playing) -> bool:
    try:
        return page(pod.metrics_address, pod.probes["readinessProbe"])[0] == 200
    except OSError:
        return False


def test_it_serves_a_trainer_who_shows_a_token_and_nobody_else(playing: Playing) -> None:
    with PolicyClient(
        playing.address, policy="p", num_examples=4, when_lost="wait", security=playing.security
    ) as client:
        for _ in range(10):
            assert client.step([0, 1], contributions=[1.0, -1.0]).source is Source.SERVED
        assert client.flush(30, durable=True)
    assert series(playing.metrics_address)['updates_total{policy="p",result="applied"}'] == 10
    stranger = Security(root_certificates=playing.security.root_certificates)
    with (
        pytest.raises(AccessDeniedError),
        PolicyClient(playing.address, policy="p", num_examples=4, security=stranger) as client,
    ):
        client.status()


def test_its_probes_answer(playing: Playing) -> None:
    for path in playing.probes.values():
        assert page(playing.metrics_address, path) == (200, "ok\n")


def test_it_has_no_right_and_knows_its_name(playing: Playing, containers: Containers) -> None:
    status = containers("podman", "exec", playing.name, "cat", "/proc/1/status")
    assert re.search(rf"^Uid:\s+{USER}\s+{USER}", status, re.MULTILINE)
    assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE)
    assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE)
    assert not containers("podman", "exec", playing.name, "touch", "/written", check=False)
    assert "equipoise-0.equipoise-pods." in containers.logs(playing.name)


def test_a_token_that_is_added_to_the_secret_comes_in_without_a_restart(playing: Playing) -> None:
    fresh = playing.tokens.add("operator")
    replaced = playing.volume / "tokens.toml.new"
    shutil.copy(playing.tokens.file, replaced)
    shutil.chown(replaced, 0, USER)
    replaced.chmod(0o440)
    replaced.rename(playing.volume / "tokens.toml")
    security = Security(root_certificates=playing.security.root_certificates, token=fresh)

    def lets_in() -> bool:
        with PolicyAdmin(playing.address, security=security) as admin:
            try:
                return admin.get("p").version > 0
            except AccessDeniedError:
                return False

    until(lets_in)
