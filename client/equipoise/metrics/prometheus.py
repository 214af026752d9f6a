"""Clients' metrics for Prometheus, by prometheus_client."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from equipoise.metrics.clients import COUNTERS, GAUGES, ROUND_TRIP, ROUND_TRIP_BUCKETS, ROUND_TRIP_HELP, Clients
from equipoise.options import Client, SessionOptions

PREFIX = "equipoise_client_"


class PrometheusMetrics(Collector):
    """What the clients of this process see, as series `equipoise_client_*` with label `policy`.

    Pass it to clients as `metrics`. They are asked at each scrape; only round trips are counted as they happen.

    Args:
        registry: where the series are; `prometheus_client.REGISTRY` is the process's common one.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._clients = Clients()
        self._round_trips = Histogram(
            f"{PREFIX}{ROUND_TRIP}_seconds",
            ROUND_TRIP_HELP,
            ("policy",),
            registry=registry,
            buckets=ROUND_TRIP_BUCKETS,
        )
        registry.register(self)

    def joined(self, client: Client, options: SessionOptions) -> None:
        """A client was made."""
        self._clients.joined(client, options)
        self._round_trips.labels(options.spec.name)

    def left(self, client: Client) -> None:
        """A client was closed."""
        self._clients.left(client)

    def answered(self, policy: str, seconds: float) -> None:
        """A step or read was answered by the server, so long after its call."""
        self._round_trips.labels(policy).observe(seconds)

    def describe(self) -> Iterator[Metric]:
        """The families, without values."""
        for reading in COUNTERS:
            yield CounterMetricFamily(PREFIX + reading.name, reading.meaning, labels=["policy"])
        for reading in GAUGES:
            yield GaugeMetricFamily(PREFIX + reading.name, reading.meaning, labels=["policy"])

    def collect(self) -> Iterator[Metric]:
        """The families, with one series for each policy."""
        found = self._clients.read((*COUNTERS, *GAUGES))
        for family in self.describe():
            assert isinstance(family, CounterMetricFamily | GaugeMetricFamily)
            for policy, value in found[family.name.removeprefix(PREFIX)].items():
                family.add_metric([policy], value)
            yield family
