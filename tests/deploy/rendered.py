"""What the chart and the Kustomize tree give: Kubernetes' objects, by their kind and name."""

import json
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from tests import wheels

DEPLOY = Path(__file__).parents[2] / "deploy"
CHART = DEPLOY / "helm" / "equipoise"
EXAMPLES = sorted((DEPLOY / "helm" / "examples").glob("*.yaml"))
KUSTOMIZE = DEPLOY / "kustomize"
VERSIONS = ("1.30", "1.34", "1.37")
"""Of Kubernetes: the oldest that the chart is for, the first with resource claims, the newest."""

Manifest: TypeAlias = dict[str, Any]


class Objects(Mapping[tuple[str, str], Manifest]):
    """Objects by kind and name."""

    def __init__(self, manifests: Iterable[Manifest]) -> None:
        self._found: dict[tuple[str, str], Manifest] = {}
        for each in manifests:
            key = (each["kind"], each["metadata"]["name"])
            assert key not in self._found, f"{key} is there twice"
            self._found[key] = each

    def __getitem__(self, key: tuple[str, str]) -> Manifest:
        return self._found[key]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def of(self, kind: str) -> list[Manifest]:
        """All of a kind."""
        return [each for (its, _), each in self.items() if its == kind]

    def one(self, kind: str) -> Manifest:
        """The only one of a kind."""
        [found] = self.of(kind)
        return found

    @property
    def pods(self) -> list[tuple[str, Manifest]]:
        """Names and specs of all pods, whoever makes them."""
        found = []
        for (kind, name), each in self.items():
            spec = each["spec"] if kind == "Pod" else each.get("spec", {}).get("template", {}).get("spec")
            if spec and "containers" in spec:
                found.append((f"{kind} {name}", spec))
        return found

    @property
    def settings(self) -> dict[str, str]:
        """Variables of the server's container, as its process would see them in pod `equipoise-0` of namespace `ml`."""
        [container] = self.one("StatefulSet")["spec"]["template"]["spec"]["containers"]
        found: dict[str, str] = {}
        for source in container["envFrom"]:
            found |= self["ConfigMap", source["configMapRef"]["name"]]["data"]
        told = {"metadata.name": "equipoise-0", "metadata.namespace": "ml"}
        for each in container["env"]:
            value = told[each["valueFrom"]["fieldRef"]["fieldPath"]] if "valueFrom" in each else each["value"]
            found[each["name"]] = re.sub(r"\$\((\w+)\)", lambda known: found[known[1]], value)
        return found


def helm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs Helm; what it said."""
    program = wheels.helm(what="the chart")
    command = [program.path, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def rendered(
    *values: Path,
    chart: Path = CHART,
    version: str = VERSIONS[-1],
    namespace: str = "ml",
    sets: Mapping[str, object] | None = None,
) -> Objects:
    """What `helm template` gives for files of values, and for single values beside them.

    Raises AssertionError with what Helm says where it refuses them.
    """
    options = [option for path in values for option in ("--values", str(path))]
    options += [
        option for name, value in (sets or {}).items() for option in ("--set-json", f"{name}={json.dumps(value)}")
    ]
    return _objects(_template(str(chart), "--namespace", namespace, "--kube-version", f"{version}.0", *options))


@cache
def _template(*options: str) -> str:
    done = helm("template", "equipoise", *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _objects(text: str) -> Objects:
    return Objects(each for each in yaml.load_all(text, Loader=yaml.CSafeLoader) if each)


def kustomized(folder: Path) -> Objects:
    """What `kubectl kustomize` gives for a folder."""
    program = wheels.kubectl(what="the Kustomize tree")
    done = subprocess.run([program.path, "kustomize", folder], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return _objects(done.stdout)
