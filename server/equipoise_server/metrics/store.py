"""How Redis answers."""

from prometheus_client import CollectorRegistry, Counter, Histogram

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

    def command(self, name: str, seconds: float) -> None:
        """Redis answered a command after `seconds`."""
        self._seconds.labels(name).observe(seconds)

    def error(self, kind: str) -> None:
        """A command failed."""
        self._errors.labels(kind).inc()
