"""Writes what the chart and the Kustomize tree hold that is decided elsewhere: settings' schema, rules and dashboards.

    python -m tests.deploy.chart_parts

Helm and Kustomize read nothing outside their folders; a test compares.
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from equipoise_server.settings import Settings
from tests.deploy.rendered import CHART, DEPLOY, KUSTOMIZE, rendered

SCHEMA = CHART / "values.schema.json"
SOURCES = {"rules": DEPLOY / "prometheus" / "rules", "dashboards": DEPLOY / "grafana" / "dashboards"}
OWN = re.compile(
    r"config|ready_file|listen|metrics_listen|advertise|device|allow_insecure|tokens_file|data_dir|fsync"
    r"|tls_(certificate|key|client_ca)"
    r"|redis_(url|url_file|username|password_file|sentinel_.*|tls_(ca|certificate|key))"
)
"""Settings that the chart sets itself, by other values."""
COMPONENT = "kustomize.config.k8s.io/v1alpha1"
_KEPT = ("type", "enum", "minimum", "exclusiveMinimum", "maximum", "default", "description")


def settings_schema() -> dict[str, Any]:
    """The schema of the value `settings`, from the server's own description of them."""
    properties = {}
    for name, described in Settings.model_json_schema()["properties"].items():
        if not OWN.fullmatch(name):
            properties[name] = {key: described[key] for key in _KEPT if key in described}
    required = ["drain_delay_s", "drain_grace_s"]  # how long a pod has to end follows from them
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


def schema() -> str:
    """The file `values.schema.json` as it should be."""
    whole = json.loads(SCHEMA.read_text(encoding="utf-8"))
    whole["properties"]["settings"] = settings_schema()
    return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"


def files() -> Iterator[tuple[Path, str]]:
    """Paths in the chart and what should be in them."""
    yield SCHEMA, schema()
    for kind, source in SOURCES.items():
        for path in sorted(source.glob("*.json" if kind == "dashboards" else "*.yaml")):
            yield CHART / "files" / kind / path.name, path.read_text(encoding="utf-8")


def components() -> Iterator[tuple[Path, str]]:
    """Paths in the Kustomize tree and what should be in them: what the chart makes of rules and dashboards."""
    monitored = rendered(CHART.parent / "examples" / "production.yaml")
    boards = [each for each in monitored.of("ConfigMap") if "-dashboard-" in each["metadata"]["name"]]
    for kind, manifests in {"rules": monitored.of("PrometheusRule"), "dashboards": boards}.items():
        resources = {}
        for each in manifests:
            meta = each["metadata"]
            kept = {name: value for name, value in meta["labels"].items() if name == "grafana_dashboard"}
            annotations = {"annotations": meta["annotations"]} if "annotations" in meta else {}
            labels = {"labels": kept} if kept else {}
            text = yaml.safe_dump(
                {**each, "metadata": {"name": meta["name"], **labels, **annotations}}, sort_keys=False
            )
            resources[f"{meta['name']}.yaml"] = text
        folder = KUSTOMIZE / "components" / kind
        lines = ["# Written by `python -m tests.deploy.chart_parts`.", f"apiVersion: {COMPONENT}", "kind: Component"]
        lines += [f"resources: [{', '.join(resources)}]", "components: [../labels]"]
        yield folder / "kustomization.yaml", "\n".join(lines) + "\n"
        yield from ((folder / name, text) for name, text in resources.items())


def stale() -> list[Path]:
    """Files that come from nowhere."""
    wanted = {path for path, _ in (*files(), *components())}
    places = [root / kind for kind in SOURCES for root in (CHART / "files", KUSTOMIZE / "components")]
    return [path for place in places for path in place.glob("*") if path not in wanted]


def main() -> None:
    """Writes them, in place of those that there are."""
    for kind in SOURCES:
        for root in (CHART / "files", KUSTOMIZE / "components"):
            shutil.rmtree(root / kind, ignore_errors=True)
    for write in (files, components):  # the second renders what the first has written
        for path, text in write():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
