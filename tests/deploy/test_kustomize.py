"""The Kustomize tree gives the same objects as the chart, and those are what Kubernetes takes."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path

import kubernetes_validate
import pytest

from tests.deploy.pod_security import violations
from tests.deploy.rendered import CHART, DEPLOY, KUSTOMIZE, VERSIONS, Manifest, Objects, kustomized, rendered

EXAMPLES = sorted(path.parent for path in (KUSTOMIZE / "examples").glob("*/kustomization.yaml"))
OF_HELM = ("helm.sh/chart", "app.kubernetes.io/managed-by")

every_example = pytest.mark.parametrize("folder", EXAMPLES, ids=lambda folder: folder.name)


def compared(objects: Objects) -> dict[tuple[str, str], Manifest]:
    """Objects without what each of the two tools adds: names by hash, labels, the Helm test."""
    return dict(_compared(objects))


def _compared(objects: Objects) -> Iterator[tuple[tuple[str, str], Manifest]]:
    [settings] = {name for kind, name in objects if kind == "ConfigMap" and "-dashboard-" not in name}
    for (kind, name), original in objects.items():
        each = copy.deepcopy(original)
        meta = each["metadata"]
        meta.pop("namespace", None)
        meta["labels"] = {key: value for key, value in meta["labels"].items() if key not in OF_HELM}
        if name == settings:
            meta["name"] = name = "settings" if kind == "ConfigMap" else name
        match kind:
            case "Pod":
                continue
            case "StatefulSet":
                template = each["spec"]["template"]
                template["metadata"].pop("annotations", None)  # Kustomize's hash of the settings is in their name
                [container] = template["spec"]["containers"]
                assert container["envFrom"][0]["configMapRef"]["name"] == settings
                container["envFrom"][0]["configMapRef"]["name"] = "settings"
            case "NetworkPolicy":
                each["spec"]["ingress"] = [rule for rule in each["spec"]["ingress"] if "-test" not in str(rule["from"])]
            case "PodMonitor" | "ServiceMonitor":
                each["spec"].pop("namespaceSelector", None)  # it lives where the pods do
        yield (kind, name), each


@every_example
def test_both_give_the_same_objects(folder: Path) -> None:
    chart = compared(rendered(CHART.parent / "examples" / f"{folder.name}.yaml"))
    tree = compared(kustomized(folder))
    assert tree.keys() == chart.keys()
    for key, expected in chart.items():
        assert tree[key] == expected, key


@every_example
def test_kubernetes_takes_what_kustomize_gives(folder: Path) -> None:
    objects = kustomized(folder)
    for name, spec in objects.pods:
        assert violations(spec) == [], name
    for each in objects.values():
        if each["apiVersion"].split("/")[0].endswith(("coreos.com", "cert-manager.io", "keda.sh")):
            continue  # tests/deploy/test_custom_resources.py looks at these, in the chart
        kubernetes_validate.validate(each, VERSIONS[-1], strict=True)


def test_a_change_of_a_setting_restarts_the_pods() -> None:
    before = kustomized(KUSTOMIZE / "examples" / "trial").one("ConfigMap")["metadata"]["name"]
    after = kustomized(KUSTOMIZE / "examples" / "gpu").one("ConfigMap")["metadata"]["name"]
    assert before != after


def test_every_component_is_in_an_example() -> None:
    components = {path.name for path in (KUSTOMIZE / "components").iterdir()}
    users = [*KUSTOMIZE.glob("examples/*/kustomization.yaml"), *KUSTOMIZE.glob("components/*/kustomization.yaml")]
    text = "".join(path.read_text(encoding="utf-8") for path in users)
    assert {
        name for name in components if re.search(rf"\.\./{name}\b(?!-)|components/{name}\b(?!-)", text)
    } == components


def test_the_page_names_every_component_and_every_example_of_the_chart() -> None:
    text = (DEPLOY / "README.md").read_text(encoding="utf-8")
    components = {path.name for path in (KUSTOMIZE / "components").iterdir()} - {"labels"}
    assert {name for name in components if f"`{name}`" not in text} == set()
    examples = (CHART.parent / "examples").glob("*.yaml")
    assert [path.name for path in examples if f"(helm/examples/{path.name})" not in text] == []
