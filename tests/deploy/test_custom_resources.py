"""Custom resources are as their projects define them: monitors, rules, certificates, scalers, routes."""

import fcntl
import json
import shutil
import subprocess
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import pytest
import yaml

from tests.deploy.rendered import CHART, DEPLOY, EXAMPLES, Manifest, rendered

HERE = Path(__file__).with_name("custom_resources")
GROUPS = (
    "cert-manager.io",
    "envoyproxy.io",
    "gateway.networking.k8s.io",
    "istio.io",
    "keda.sh",
    "monitoring.coreos.com",
)
INSTALL_S = 300


@pytest.fixture(scope="module", autouse=True)
def models() -> None:
    """The projects' definitions, from npm; the tests say that they did not run where these are not to be had."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"custom resources were not looked at: there is no {program} on this machine")
    with (HERE / "package.json").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (HERE / "node_modules" / ".package-lock.json").exists():
            command = ["npm", "ci", "--prefer-offline", "--silent"]
            done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=INSTALL_S, check=False)
            if done.returncode:
                pytest.skip(f"custom resources were not looked at: npm ci failed: {done.stderr.strip()[-300:]}")


def complaints(resources: Sequence[Manifest]) -> dict[str, list[str]]:
    """What is wrong with each, by kind and name."""
    done = subprocess.run(
        ["node", HERE / "check.mjs"],
        input=json.dumps(resources),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    names = [f"{each['kind']} {each['metadata']['name']}" for each in resources]
    return {name: said for name, said in zip(names, json.loads(done.stdout), strict=True) if said}


def is_custom(resource: Manifest) -> bool:
    return resource["apiVersion"].split("/")[0].endswith(GROUPS)


def of_the_chart() -> list[Manifest]:
    found = [each for example in EXAMPLES for each in rendered(example).values() if is_custom(each)]
    return [each for index, each in enumerate(found) if each not in found[:index]]


def of_routing() -> list[Manifest]:
    files = sorted((DEPLOY / "routing").glob("*.yaml"))
    manifests = [each for path in files for each in yaml.safe_load_all(path.read_text(encoding="utf-8"))]
    return [each for each in manifests if "kind" in each]


def test_those_of_the_chart_are_right() -> None:
    found = of_the_chart()
    assert {each["kind"] for each in found} >= {"PodMonitor", "ServiceMonitor", "Certificate", "ScaledObject"}
    assert complaints(found) == {}


def test_those_of_routing_are_right() -> None:
    found = of_routing()
    assert {each["kind"] for each in found} == {
        "GRPCRoute",
        "BackendTrafficPolicy",
        "ClientTrafficPolicy",
        "DestinationRule",
    }
    assert complaints(found) == {}


def test_a_wrong_one_is_seen() -> None:
    [monitor] = rendered(CHART.parent / "examples" / "production.yaml").of("PodMonitor")
    misspelt, out_of_rule, incomplete = deepcopy(monitor), deepcopy(monitor), deepcopy(monitor)
    misspelt["spec"]["podMetricsEndpoints"][0]["path_"] = "/metrics"
    out_of_rule["spec"]["podMetricsEndpoints"][0]["interval"] = "15 s"
    del incomplete["spec"]["selector"]
    for number, broken in enumerate((misspelt, out_of_rule, incomplete)):
        broken["metadata"]["name"] = str(number)
    said = complaints([misspelt, out_of_rule, incomplete])
    assert ["path_" in str(said["PodMonitor 0"]), "interval" in str(said["PodMonitor 1"])] == [True, True]
    assert "selector" in str(said["PodMonitor 2"])
