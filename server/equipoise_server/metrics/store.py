"""How Redis answers."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from equipoise_server.metrics.names import PREFIX, SECONDS_BUCKETS


class StoreMetrics:
    """Hears of every command to Redis. Thread-safe."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = Histogram(
            f"{PREFIX}redis_command_duration_seconds",
            "Time from a command to Redis to its answer.",
            ("command",),
            registry=registry,
            buckets=SECONDS_BUCKETS,
        )
        self._errors = Counter(
            f"{PREFIX}redis_errors", "Commands to Redis that failed, by kind.", ("kind",), registry=registry
        )
        self._sync_failing = Gauge(
            f"{PREFIX}redis_sync_failing",
            "Whether the disk refuses the files of the server's own Redis (0 or 1).",
            registry=registry,
        )

    def command(self, name: str, seconds: float) -> None:
        """Redis answered a command after `seconds`."""
        self._seconds.labels(name).observe(seconds)

    def error(self, kind: str) -> None:
        """A command failed."""
        self._errors.labels(kind).inc()

    def syncs(self, *, failing: bool) -> None:
        """The files of the server's own Redis reach the disk, or do not."""
        self._sync_failing.set(failing)
