"""Clients' metrics for OpenTelemetry, by its API; the SDK and exporter are the application's."""

from collections.abc import Callable, Iterator

from opentelemetry.metrics import CallbackOptions, Meter, Observation

from equipoise.metrics.clients import (
    COUNTERS,
    GAUGES,
    ROUND_TRIP,
    ROUND_TRIP_BUCKETS,
    ROUND_TRIP_HELP,
    Clients,
    Reading,
)
from equipoise.options import Client, SessionOptions

PREFIX = "equipoise.client."


class OpenTelemetryMetrics:
    """What the clients of this process see, as instruments `equipoise.client.*` with attribute `policy`.

    Pass it to clients as `metrics`. An exporter for Prometheus gives them the names of `PrometheusMetrics`.

    Args:
        meter: that the instruments belong to, such as `opentelemetry.metrics.get_meter("equipoise")`.
    """

    def __init__(self, meter: Meter) -> None:
        self._clients = Clients()
        for reading in COUNTERS:
            meter.create_observable_counter(
                PREFIX + reading.name, callbacks=[self._observer(reading)], description=reading.meaning
            )
        for reading in GAUGES:
            meter.create_observable_gauge(
                PREFIX + reading.name, callbacks=[self._observer(reading)], description=reading.meaning
            )
        self._round_trips = meter.create_histogram(
            PREFIX + ROUND_TRIP,
            unit="s",
            description=ROUND_TRIP_HELP,
            explicit_bucket_boundaries_advisory=ROUND_TRIP_BUCKETS,
        )

    def joined(self, client: Client, options: SessionOptions) -> None:
        """A client was made."""
        self._clients.joined(client, options)

    def left(self, client: Client) -> None:
        """A client was closed."""
        self._clients.left(client)

    def answered(self, policy: str, seconds: float) -> None:
        """A step or read was answered by the server, so long after its call."""
        self._round_trips.record(seconds, {"policy": policy})

    def _observer(self, reading: Reading) -> Callable[[CallbackOptions], Iterator[Observation]]:
        def observe(options: CallbackOptions) -> Iterator[Observation]:
            del options
            for policy, value in self._clients.read([reading])[reading.name].items():
                yield Observation(value, {"policy": policy})

        return observe
