"""What the chart says of the server is so: ports, probes, names, files, time to end, and variables of Kubernetes."""

import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from equipoise import PolicyClient, Source, testing
from equipoise_server import app
from equipoise_server.settings import Settings, load
from tests.deploy.chart_parts import OWN
from tests.deploy.rendered import CHART, EXAMPLES, Manifest, Objects, rendered
from tests.e2e.faults.proxy import until
from tests.e2e.watched import page
from tests.patience import PATIENT
from tests.servers import serve

TRIAL = CHART.parent / "examples" / "trial.yaml"
MOUNT = "/etc/equipoise/"
MARGIN_S = 5.0

every_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)


def settings(objects: Objects, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """What the server makes of a pod's variables."""
    for name in [name for name in os.environ if name.startswith("EQUIPOISE_")]:
        monkeypatch.delenv(name)
    for name, value in objects.settings.items():
        monkeypatch.setenv(name, value)
    return load([])


def pod(objects: Objects) -> Manifest:
    template: Manifest = objects.one("StatefulSet")["spec"]["template"]
    return template


def container(objects: Objects) -> Manifest:
    [found] = pod(objects)["spec"]["containers"]
    return dict(found)


@every_example
def test_the_server_understands_its_variables(example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = rendered(example)
    found = settings(objects, monkeypatch)
    ports = {each["name"]: each["containerPort"] for each in container(objects)["ports"]}
    assert found.listen == f":{ports['grpc']}"
    assert found.metrics_listen == f":{ports['metrics']}"
    assert found.redis_url is not None or found.redis_url_file is not None
    assert found.device == ("cuda" if "gpu" in example.stem else "cpu")


def test_numbers_arrive_as_they_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"max_examples": 4_000_000_001, "log_timeout_s": 0.125, "max_streams": 1_000_000}
    sets = {f"settings.{name}": value for name, value in (given | {"redis_tls_check_hostname": False}).items()}
    found = settings(rendered(TRIAL, sets=sets), monkeypatch)
    assert (found.max_examples, found.log_timeout_s, found.max_streams) == (4_000_000_001, 0.125, 1_000_000)
    assert found.redis_tls_check_hostname is False


def test_what_the_chart_sets_itself_are_settings() -> None:
    named = {name for name in Settings.model_fields if OWN.fullmatch(name)}
    assert len(named) == 22
    for example in EXAMPLES:
        for variable in rendered(example).settings:
            if variable.startswith("EQUIPOISE_"):
                assert variable.removeprefix("EQUIPOISE_").lower() in Settings.model_fields


@every_example
def test_every_file_that_is_named_is_mounted_and_every_one_that_is_mounted_is_named(example: Path) -> None:
    objects = rendered(example)
    named = {value for value in objects.settings.values() if value.startswith(MOUNT)}
    mounted = set()
    for volume in pod(objects)["spec"].get("volumes", []):
        [mount] = [each for each in container(objects)["volumeMounts"] if each["name"] == volume["name"]]
        assert "subPath" not in mount  # the kubelet would not bring new contents
        for source in volume["projected"]["sources"]:
            mounted |= {f"{mount['mountPath']}/{item['path']}" for item in source["secret"]["items"]}
        assert volume["projected"]["defaultMode"] & 0o007 == 0  # the server warns of secrets that everybody can read
        assert volume["projected"]["defaultMode"] & 0o040
        assert pod(objects)["spec"]["securityContext"]["fsGroup"]
    assert named == mounted


def test_probes_ask_what_the_server_answers() -> None:
    probes = {kind: container(rendered(TRIAL))[f"{kind}Probe"] for kind in ("startup", "liveness", "readiness")}
    assert {probe["httpGet"]["port"] for probe in probes.values()} == {"metrics"}
    with serve() as server:
        until(lambda: page(server.metrics_address, "/readyz")[0] == 200, what=lambda: server.log[-2000:])
        for probe in probes.values():
            assert page(server.metrics_address, probe["httpGet"]["path"]) == (200, "ok\n")
    assert probes["startup"]["httpGet"]["path"] == probes["liveness"]["httpGet"]["path"] == "/livez"
    assert probes["readiness"]["httpGet"]["path"] == "/readyz"
    assert probes["startup"]["periodSeconds"] * probes["startup"]["failureThreshold"] >= 300


@pytest.mark.parametrize(("delay_s", "grace_s"), [(5, 20), (0.5, 120), (30, 0)])
def test_a_pod_has_time_for_the_whole_drain(delay_s: float, grace_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = rendered(TRIAL, sets={"settings.drain_delay_s": delay_s, "settings.drain_grace_s": grace_s})
    found = settings(objects, monkeypatch)
    drain_s = found.drain_delay_s + found.drain_grace_s + 2 * app.FLUSH_TIMEOUT_S
    assert pod(objects)["spec"]["terminationGracePeriodSeconds"] >= drain_s + MARGIN_S


@every_example
def test_services_and_policies_select_the_server_and_nothing_else(example: Path) -> None:
    objects = rendered(example)
    labels, test = pod(objects)["metadata"]["labels"], objects.one("Pod")["metadata"]["labels"]
    ports = {each["name"] for each in container(objects)["ports"]}
    spread = pod(objects)["spec"]["topologySpreadConstraints"]
    selectors: list[Mapping[str, str]] = [
        objects.one("StatefulSet")["spec"]["selector"]["matchLabels"],
        objects.one("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        objects.one("NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        *(each["labelSelector"]["matchLabels"] for each in spread),
        *(each["spec"]["selector"] for each in objects.of("Service")),
        *(each["spec"]["selector"]["matchLabels"] for each in objects.of("PodMonitor")),
    ]
    for selector in selectors:
        assert selector.items() <= labels.items()
        assert not selector.items() <= test.items()
    for service in objects.of("Service"):
        assert {each["targetPort"] for each in service["spec"]["ports"]} <= ports
    for monitor in objects.of("ServiceMonitor"):
        wanted = monitor["spec"]["selector"]["matchLabels"]
        [service] = [each for each in objects.of("Service") if wanted.items() <= each["metadata"]["labels"].items()]
        assert service["spec"]["clusterIP"] == "None"
        assert monitor["spec"]["endpoints"][0]["port"] in {each["name"] for each in service["spec"]["ports"]}
    for rule in objects.one("NetworkPolicy")["spec"]["ingress"]:
        assert rule["from"]
        assert {each["port"] for each in rule["ports"]} <= ports


def test_a_pod_is_found_under_the_name_that_it_advertises(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = rendered(CHART.parent / "examples" / "cert-manager.yaml", namespace="ml")
    host, _, port = settings(objects, monkeypatch).advertise.rpartition(":")
    name, service, namespace, *rest = host.split(".")
    headless = objects["Service", service]
    assert name == f"{objects.one('StatefulSet')['metadata']['name']}-0"
    assert service == objects.one("StatefulSet")["spec"]["serviceName"]
    assert (namespace, rest) == ("ml", ["svc", "cluster", "local"])
    assert headless["spec"]["clusterIP"] == "None"
    assert headless["spec"]["publishNotReadyAddresses"] is True
    assert {str(each["port"]) for each in headless["spec"]["ports"]} >= {port}
    certified = objects.one("Certificate")["spec"]["dnsNames"]
    assert any(re.fullmatch(pattern.replace(".", r"\.").replace("*", "[^.]+"), host) for pattern in certified)
    assert {f"equipoise.{namespace}", "equipoise.example.org"} <= set(certified)


def service_links(objects: Objects) -> dict[str, str]:
    """What a kubelet sets in every pod of the namespace for its Services, but for headless ones.

    Source: Kubernetes, pkg/kubelet/envvars.
    """
    found = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}
    for service in objects.of("Service"):
        if service["spec"].get("clusterIP") == "None":
            continue
        prefix = service["metadata"]["name"].upper().replace("-", "_")
        host = str(ipaddress.ip_address("10.96.0.7"))
        first, *_ = ports = service["spec"]["ports"]
        found |= {f"{prefix}_SERVICE_HOST": host, f"{prefix}_SERVICE_PORT": str(first["port"])}
        found[f"{prefix}_PORT"] = f"tcp://{host}:{first['port']}"
        for port in ports:
            if port.get("name"):
                found[f"{prefix}_SERVICE_PORT_{port['name'].upper().replace('-', '_')}"] = str(port["port"])
            link = f"{prefix}_PORT_{port['port']}_TCP"
            found |= {link: f"tcp://{host}:{port['port']}", f"{link}_PROTO": "tcp", f"{link}_PORT": str(port["port"])}
            found[f"{link}_ADDR"] = host
    return found


@pytest.mark.parametrize("release", ["equipoise", "equipoise-blue"])
def test_the_server_starts_beside_services_of_its_name(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever leaves enableServiceLinks as it is, in a pod of his own, gets all of these."""
    links = service_links(rendered(TRIAL, sets={"fullnameOverride": release}))
    assert len([name for name in links if name.startswith("EQUIPOISE_")]) >= 8
    for name, value in links.items():
        monkeypatch.setenv(name, value)
    with testing.serve() as server, PolicyClient(server.address, policy="p", num_examples=4, timeout=PATIENT) as client:
        assert client.step([0, 1], contributions=[1.0, -1.0]).source is Source.SERVED


def test_the_hpa_and_keda_ask_for_what_the_server_exports() -> None:
    query: Any = rendered(CHART.parent / "examples" / "keda.yaml").one("ScaledObject")["spec"]["triggers"][0]
    [name] = set(re.findall(r"equipoise_server_\w+", query["metadata"]["query"]))
    with serve() as server:
        assert f"\n{name} " in page(server.metrics_address, "/metrics")[1]
