"""The page of all metrics, deploy/prometheus/metrics.md: its tables are made from what a server exports.

`python -m tests.deploy.metrics_page` writes them anew, after a change to a metric.
"""

from collections.abc import Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from equipoise import PolicyClient
from equipoise.metrics.prometheus import PrometheusMetrics
from equipoise_server.metrics import Metrics, ParentMetrics, ServerStatus
from equipoise_server.metrics.merging import OF_SEVERAL
from tests.server.metrics.exposed import full_house

PAGE = Path(__file__).parents[2] / "deploy" / "prometheus" / "metrics.md"
BEGIN, END = "<!-- begin of {} -->\n", "<!-- end of {} -->\n"
GROUPS = {"equipoise_server_": "ours", "equipoise_client_": "clients", "grpc_server_": "calls", "": "process"}
"""Tables of the page by how names begin; the first that fits."""


def rows() -> Iterator[tuple[str, str]]:
    """The row of every family that a server with everything exports, and a client, with its group."""
    metrics = Metrics(build={"version": "1", "python": "3", "grpcio": "1"}, tenant_of=lambda policy: policy[:2])
    metrics.scrape(lambda: full_house(3, 2))
    pages = metrics.exposition()[0].decode() + _of_several() + _of_a_client()
    for family in text_string_to_metric_families(pages):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        name, kind = (f"{name}_info", "gauge") if family.type == "info" else (name, family.type)
        labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
        group = next(group for start, group in GROUPS.items() if name.startswith(start))
        meaning = family.documentation.replace("|", "\\|")
        yield group, f"| `{name}` | {kind} | {', '.join(labels)} | {meaning} |\n"


def _of_several() -> str:
    """What only the parent of several processes tells."""
    text = ParentMetrics(processes=2).exposition(ServerStatus(), running=2)[0].decode()
    return "".join(f"{line}\n" for line in text.splitlines() if any(name in line for name in OF_SEVERAL))


def _of_a_client() -> str:
    registry = CollectorRegistry()
    with PolicyClient(policy="p", metrics=PrometheusMetrics(registry)):
        return generate_latest(registry).decode()


def written() -> str:
    """The page as it should be."""
    text = PAGE.read_text(encoding="utf-8")
    found = sorted(rows(), key=lambda row: row[1].split("`")[1])
    for group in GROUPS.values():
        begin, end = BEGIN.format(group), END.format(group)
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        head = "| metric | type | labels | meaning |\n|---|---|---|---|\n"
        table = head + "".join(row for of, row in found if of == group)
        text = before + begin + table + end + after
    return text


if __name__ == "__main__":
    PAGE.write_text(written(), encoding="utf-8")
