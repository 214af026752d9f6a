"""What the server is doing at one moment, read at scrape time instead of being counted up and down."""

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from equipoise_server.engine import PolicyStatus
from equipoise_server.metrics.names import PREFIX


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStatus:
    """The state of the server, taken on its event loop.

    Attributes:
        policies: those in memory.
        loading: policies on their way into memory.
        queued_steps: steps that wait for the device, over all policies.
        inflight_bytes: bytes of the steps that wait or are being worked on.
        active_streams: open training streams.
        trainers: trainers that are remembered, over all policies.
        tasks: tasks of the event loop.
        unpersisted_updates: steps applied that are not in Redis yet.
        redis_up: whether the last word from Redis was an answer.
        draining: whether the server is about to stop.
        certificate_expires: when the server's certificate ends, seconds since the epoch; None without TLS.
    """

    policies: tuple[PolicyStatus, ...] = ()
    loading: int = 0
    queued_steps: int = 0
    inflight_bytes: int = 0
    active_streams: int = 0
    trainers: int = 0
    tasks: int = 0
    unpersisted_updates: int = 0
    redis_up: bool = False
    draining: bool = False
    certificate_expires: float | None = None


GAUGES = (
    ("policies_loading", "loading", "Policies on their way from Redis into memory."),
    ("queue_depth", "queued_steps", "Steps that wait for the device, over all policies."),
    ("inflight_bytes", "inflight_bytes", "Bytes of the steps that wait or are being worked on."),
    ("active_streams", "active_streams", "Open training streams."),
    ("clients", "trainers", "Trainers that are remembered, over all policies."),
    ("event_loop_tasks", "tasks", "Tasks of the event loop: a few, and a few for each stream."),
    ("unpersisted_updates", "unpersisted_updates", "Steps applied that are not in Redis yet."),
    ("redis_up", "redis_up", "1 when the last word from Redis was an answer."),
    ("draining", "draining", "1 while the server is about to stop."),
    ("certificate_expiry_timestamp_seconds", "certificate_expires", "When the server's certificate ends."),
)


class StatusCollector(Collector):
    """Yields the gauges of the status last given."""

    def __init__(self) -> None:
        self._status = ServerStatus()

    def show(self, status: ServerStatus) -> None:
        """Takes the status of now."""
        self._status = status

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The gauges."""
        status = self._status
        for name, attribute, help_text in GAUGES:
            value = getattr(status, attribute)
            if value is not None:
                yield GaugeMetricFamily(PREFIX + name, help_text, float(value))
