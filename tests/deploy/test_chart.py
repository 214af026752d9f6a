"""The Helm chart: it renders for every use, to objects that Kubernetes takes, and refuses what the server would."""

import json
import re
import shutil
import tomllib
from copy import deepcopy
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from tests.deploy import chart_parts
from tests.deploy.pod_security import violations
from tests.deploy.rendered import CHART, DEPLOY, EXAMPLES, VERSIONS, Objects, helm, rendered

ROOT = Path(__file__).parents[2]
CUSTOM = re.compile(r".*\.(coreos\.com|cert-manager\.io|keda\.sh)/.*|keda\.sh/.*|cert-manager\.io/.*")
ONLY_SINCE = {"gpu-claim.yaml": "1.34"}
TRIAL, PRODUCTION = (CHART.parent / "examples" / f"{name}.yaml" for name in ("trial", "production"))

CASES = [
    pytest.param(example, version, id=f"{example.stem}-{version}")
    for example in EXAMPLES
    for version in VERSIONS
    if float(version.split(".")[1]) >= float(ONLY_SINCE.get(example.name, "1.0").split(".")[1])
]


@pytest.mark.parametrize("example", [None, *EXAMPLES], ids=lambda path: path.stem if path else "defaults")
def test_helm_has_no_complaint(example: Path | None) -> None:
    done = helm("lint", "--strict", CHART, *(("--values", example) if example else ()))
    assert done.returncode == 0, done.stdout
    assert "WARNING" not in done.stdout


@pytest.mark.parametrize(("example", "version"), CASES)
def test_kubernetes_takes_every_object(example: Path, version: str) -> None:
    taken = []
    for each in rendered(example, version=version).values():
        if not CUSTOM.fullmatch(each["apiVersion"]):
            kubernetes_validate.validate(each, version, strict=True)
            taken.append(each["kind"])
    assert {"StatefulSet", "Service", "ConfigMap", "NetworkPolicy", "PodDisruptionBudget"} <= set(taken)


def test_the_valkey_for_a_first_look_is_what_the_trial_asks() -> None:
    objects = Objects(yaml.safe_load_all((DEPLOY / "valkey.yaml").read_text(encoding="utf-8")))
    for version in VERSIONS:
        for each in objects.values():
            kubernetes_validate.validate(each, version, strict=True)
    [(_, spec)] = objects.pods
    assert violations(spec) == []
    [port] = objects.one("Service")["spec"]["ports"]
    asked = rendered(TRIAL).settings["EQUIPOISE_REDIS_URL"]
    assert asked == f"redis://{objects.one('Service')['metadata']['name']}:{port['port']}"
    [allowed] = objects.one("NetworkPolicy")["spec"]["ingress"][0]["from"]
    labels = rendered(TRIAL).one("StatefulSet")["spec"]["template"]["metadata"]["labels"]
    assert allowed["podSelector"]["matchLabels"].items() <= labels.items()


def test_an_object_with_a_misspelt_field_would_not_be_taken() -> None:
    broken = deepcopy(rendered(TRIAL).one("StatefulSet"))
    broken["spec"]["template"]["spec"]["enableServiceLink"] = False
    with pytest.raises(kubernetes_validate.ValidationError, match="enableServiceLink"):
        kubernetes_validate.validate(broken, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_pod_is_restricted(example: Path) -> None:
    pods = rendered(example).pods
    assert len(pods) == 2  # the server and the Helm test
    for name, spec in pods:
        assert violations(spec) == [], name
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert all(each["securityContext"]["readOnlyRootFilesystem"] for each in spec["containers"])


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("hostNetwork",), True, "hostNetwork"),
        (("securityContext", "runAsNonRoot"), False, "runAsNonRoot"),
        (("securityContext", "seccompProfile"), {}, "seccompProfile"),
        (("volumes",), [{"name": "v", "hostPath": {"path": "/"}}], "hostPath"),
        (("containers", 0, "securityContext", "capabilities"), {}, "capabilities"),
        (("containers", 0, "securityContext", "allowPrivilegeEscalation"), None, "allowPrivilegeEscalation"),
        (("containers", 0, "securityContext", "runAsUser"), 0, "root"),
    ],
)
def test_a_pod_that_may_more_would_be_seen(path: tuple[str | int, ...], value: object, said: str) -> None:
    spec = deepcopy(rendered(TRIAL).one("StatefulSet")["spec"]["template"]["spec"])
    place = spec
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert [said in each for each in violations(spec)] == [True]


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        ({"redis.url": ""}, "redis: give redis.url"),
        ({"allowInsecure": False}, "not guarded"),
        ({"allowInsecure": False, "tls.existingSecret": "t"}, "not guarded"),
        ({"allowInsecure": False, "tokens.existingSecret": "t"}, "not guarded"),
        ({"tls.clientCertificates": True}, "clientCertificates needs"),
        ({"redis.existingSecret": {"name": "s", "urlKey": "u"}}, "keep one"),
        ({"gpu": {"resource": "nvidia.com/gpu", "claim": {"deviceClassName": "gpu.nvidia.com"}}}, "keep one"),
        ({"autoscaling.kind": "KEDA"}, "KEDA needs autoscaling.prometheus"),
        ({"redis.url": "redis://user:secret@host:6379"}, "does not match pattern"),
        ({"settings.max_stream": 7}, "max_stream"),
        ({"settings.max_streams": 0}, "max_streams"),
        ({"settings.listen": ":1"}, "listen"),
        ({"settings.drain_grace_s": None}, "drain_grace_s"),
        ({"networkPolicy.trainers": []}, "trainers"),
        ({"networkPolicy.trainers": None}, "trainers"),
        ({"replica": 2}, "replica"),
        ({"monitoring": None}, "monitoring"),
        ({"monitoring.monitor": "Podmonitor"}, "monitor"),
        ({"gpu.claim": {"selectors": []}}, "deviceClassName"),
    ],
)
def test_bad_values_are_refused_by_name(sets: dict[str, object], said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        rendered(TRIAL, sets=sets)


def test_a_resource_claim_says_which_kubernetes_it_needs() -> None:
    with pytest.raises(AssertionError, match=r"claim needs Kubernetes 1\.34, this is v?1\.30"):
        rendered(CHART.parent / "examples" / "gpu-claim.yaml", version="1.30")


def test_the_ports_of_processes_are_open_to_trainers_alone() -> None:
    one, four = (
        rendered(TRIAL, sets=sets).one("NetworkPolicy")["spec"]["ingress"] for sets in ({}, {"settings.processes": 4})
    )
    assert four[0]["ports"] == [*one[0]["ports"], {"protocol": "TCP", "port": 50052, "endPort": 50055}]
    assert four[1:] == one[1:]
    settings = rendered(TRIAL, sets={"settings.processes": 4}).settings
    assert settings["EQUIPOISE_PROCESSES"] == "4"
    assert settings["EQUIPOISE_LISTEN"] == ":50051"


def test_values_of_a_parent_chart_are_allowed() -> None:
    assert rendered(TRIAL, sets={"global.anything.at": "all"})


@pytest.mark.parametrize("kind", ["hpa", "keda"])
def test_an_autoscaler_has_the_replicas_to_itself(kind: str) -> None:
    scaled = rendered(CHART.parent / "examples" / f"{kind}.yaml")
    assert "replicas" not in scaled.one("StatefulSet")["spec"]
    [scaler] = [*scaled.of("HorizontalPodAutoscaler"), *scaled.of("ScaledObject")]
    target = scaler["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("StatefulSet", scaled.one("StatefulSet")["metadata"]["name"])
    assert rendered(TRIAL).one("StatefulSet")["spec"]["replicas"] == 1


def test_a_gpu_is_limited_to_one_also_where_nothing_else_is() -> None:
    sets = {"gpu.resource": "nvidia.com/mig-1g.10gb", "resources.limits": None, "resources.requests": None}
    [container] = rendered(TRIAL, sets=sets).one("StatefulSet")["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/mig-1g.10gb": 1}
    assert container["image"].endswith("-cuda")


def test_names_stay_within_kubernetes_limits() -> None:
    long = "n" * 60
    named = rendered(TRIAL, sets={"fullnameOverride": long})
    for kind, name in named:
        assert len(name) <= 63, (kind, name)
    assert len(named.one("StatefulSet")["metadata"]["name"]) + len("-0123456789") <= 63


def test_the_chart_is_of_the_version_of_the_project() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert chart["version"] == chart["appVersion"] == project["version"]
    assert chart["description"] == project["description"]


def test_chart_and_kustomize_hold_what_is_decided_elsewhere() -> None:
    advice = "run: python -m tests.deploy.chart_parts"
    for path, text in (*chart_parts.files(), *chart_parts.components()):
        assert path.exists(), f"{path} is missing; {advice}"
        assert path.read_text(encoding="utf-8") == text, f"{path} is old; {advice}"
    assert chart_parts.stale() == [], advice


def test_monitoring_brings_every_rule_and_every_dashboard() -> None:
    monitored = rendered(PRODUCTION)
    assert rules(monitored) == [
        group
        for path in sorted((CHART / "files" / "rules").glob("*.yaml"))
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
    ]
    boards = {path.name: json.loads(path.read_bytes()) for path in (CHART / "files" / "dashboards").glob("*.json")}
    assert dashboards(monitored) == boards


def test_rules_and_dashboards_arrive_as_they_are(tmp_path: Path) -> None:
    """Also what looks like a template, which both are full of."""
    chart = tmp_path / "equipoise"
    shutil.copytree(CHART, chart)
    rule = {
        "alert": "Down",
        "expr": 'up{job="equipoise"} == 0',
        "annotations": {"summary": "{{ $labels.pod }}: {{ $value }}"},
    }
    board = {"uid": "b", "panels": [{"targets": [{"expr": 'sum(up{pod=~"$pod"})', "legendFormat": "{{pod}} é"}]}]}
    for folder in ("rules", "dashboards"):
        shutil.rmtree(chart / "files" / folder, ignore_errors=True)
        (chart / "files" / folder).mkdir(parents=True)
    for name in ("a", "b"):
        (chart / "files" / "rules" / f"{name}.yaml").write_text(
            yaml.safe_dump({"groups": [{"name": name, "rules": [rule]}]})
        )
    (chart / "files" / "dashboards" / "learning.json").write_text(json.dumps(board))
    monitored = rendered(PRODUCTION, chart=chart)
    assert rules(monitored) == [{"name": "a", "rules": [rule]}, {"name": "b", "rules": [rule]}]
    assert dashboards(monitored) == {"learning.json": board}
    [found] = [each for each in monitored.of("ConfigMap") if "learning.json" in each["data"]]
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_what_monitors_may_live_elsewhere_and_still_finds_the_pods() -> None:
    keda = rendered(CHART.parent / "examples" / "keda.yaml", namespace="ml")
    monitor = keda.one("ServiceMonitor")
    assert monitor["metadata"]["namespace"] == "monitoring"
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    assert monitor["spec"]["namespaceSelector"] == {"matchNames": ["ml"]}


def rules(objects: Objects) -> list[object]:
    return [group for rule in objects.of("PrometheusRule") for group in rule["spec"]["groups"]]


def dashboards(objects: Objects) -> dict[str, object]:
    maps = [each for each in objects.of("ConfigMap") if "-dashboard-" in each["metadata"]["name"]]
    return {name: json.loads(text) for each in maps for name, text in each["data"].items()}
