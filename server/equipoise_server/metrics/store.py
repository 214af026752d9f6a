"""How Redis answers."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from equipoise_server.metrics.names import OTHER, PREFIX, REDIS_SECONDS_BUCKETS
from equipoise_server.store import UNAVAILABLE_KINDS

COMMANDS = (
    "acquire", "append", "confirm", "fence_check", "get", "heartbeat", "owner", "ping", "read_log", "release",
    "republish", "stage", "trim", OTHER,
)  # fmt: skip
"""Commands with a series of their own: those of steps, sweeps, loading and ownership."""

KINDS = (*UNAVAILABLE_KINDS, "fenced", "lost")
"""Why a command fails."""


class StoreMetrics:
    """Hears of every command to Redis. Thread-safe."""

    def __init__(self, registry: CollectorRegistry) -> None:
        seconds = Histogram(
            f"{PREFIX}redis_command_duration_seconds",
            "Time from a command to Redis to its answer.",
            ("command",),
            registry=registry,
            buckets=REDIS_SECONDS_BUCKETS,
        )
        errors = Counter(
            f"{PREFIX}redis_errors", "Commands to Redis that failed, by kind.", ("kind",), registry=registry
        )
        self._seconds = {name: seconds.labels(name) for name in COMMANDS}
        self._errors = {kind: errors.labels(kind) for kind in KINDS}
        self._sync_failing = Gauge(
            f"{PREFIX}redis_sync_failing",
            "Whether the disk refuses the files of the server's own Redis (0 or 1).",
            registry=registry,
        )

    def command(self, name: str, seconds: float) -> None:
        """Redis answered a command after `seconds`."""
        self._seconds[name if name in self._seconds else OTHER].observe(seconds)

    def error(self, kind: str) -> None:
        """A command failed."""
        self._errors[kind if kind in self._errors else OTHER].inc()

    def syncs(self, *, failing: bool) -> None:
        """The files of the server's own Redis reach the disk, or do not."""
        self._sync_failing.set(failing)
