"""What the server is doing at one moment, read at scrape time instead of being counted up and down."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from equipoise_server.metrics.names import PREFIX
from equipoise_server.metrics.tenants import TenantStatus
from equipoise_server.security import Reloads
from equipoise_server.store import Usage

if TYPE_CHECKING:  # the engine loads torch, which the parent of several processes does without
    from equipoise_server.engine import ServiceStatus


@dataclass(frozen=True, slots=True)
class Use:
    """How much of something is used, and the most that may be."""

    used: int = 0
    limit: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadingStatus:
    """The policies on their way into memory: how many, how far they are together, and for how long the slowest."""

    policies: int = 0
    pages: int = 0
    read_pages: int = 0
    entries: int = 0
    replayed: int = 0
    longest_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStatus:
    """The state of the server, taken on its event loop. Before all of it runs, the rest is as if there were nothing.

    Attributes:
        checks: what has to be well for the server to be ready, and why it is not; empty: it is well.
        policies: those in memory, and those that left it because nobody used them.
        loading: policies on their way into memory.
        streams: open training streams.
        calls: calls under way.
        inflight_bytes: bytes of the steps that wait or are being worked on.
        import_bytes: bytes of the policies that are being imported.
        log_memory_bytes: memory of the log entries that are kept.
        tasks: tasks of the event loop.
        tenants: what each tenant takes.
        device: name of the device.
        device_bytes: its memory, by what is told of it.
        redis_up: whether the last word from Redis was an answer.
        address_shared: whether another server advertises this one's address.
        draining: whether the server is about to stop.
        certificate_expires: when the server's certificate ends, seconds since the epoch; None without TLS.
        reloads: of files, by what they hold.
        own_redis: what the server's own Redis takes; None: it has none, or nobody knows yet.
        own_redis_exits: how often that ended by itself; None: the server has none.
    """

    checks: Mapping[str, str] = field(default_factory=dict)
    policies: "tuple[ServiceStatus, ...]" = ()
    loading: LoadingStatus = LoadingStatus()
    streams: Use = Use()
    calls: Use = Use()
    inflight_bytes: Use = Use()
    import_bytes: Use = Use()
    log_memory_bytes: Use = Use()
    tasks: int = 0
    tenants: tuple[TenantStatus, ...] = ()
    device: str = "cpu"
    device_bytes: Mapping[str, int] = field(default_factory=dict)
    redis_up: bool = False
    address_shared: bool = False
    draining: bool = False
    certificate_expires: float | None = None
    reloads: Mapping[str, Reloads] = field(default_factory=dict)
    own_redis: Usage | None = None
    own_redis_exits: int | None = None


Value = Callable[[ServerStatus], float | None]

GAUGES: tuple[tuple[str, str, Value], ...] = (
    ("ready", "1 when the server is ready: what /readyz says.", lambda now: not any(now.checks.values())),
    ("draining", "1 while the server is about to stop.", lambda now: now.draining),
    ("redis_up", "1 when the last word from Redis was an answer.", lambda now: now.redis_up),
    ("address_shared", "1 while another server advertises the same address.", lambda now: now.address_shared),
    ("policies_loading", "Policies on their way from Redis into memory.", lambda now: now.loading.policies),
    ("loading_pages", "Pages that the policies on their way have to read.", lambda now: now.loading.pages),
    ("loading_pages_read", "Pages that the policies on their way have read.", lambda now: now.loading.read_pages),
    ("loading_entries", "Log entries that the policies on their way have to replay.", lambda now: now.loading.entries),
    (
        "loading_entries_replayed",
        "Log entries that the policies on their way have replayed.",
        lambda now: now.loading.replayed,
    ),
    (
        "loading_longest_seconds",
        "For how long the slowest policy has been on its way into memory.",
        lambda now: now.loading.longest_s,
    ),
    (
        "queue_depth",
        "Steps that wait for the device, over all policies.",
        lambda now: sum(each.queued_steps for each in now.policies),
    ),
    (
        "queue_fullest_ratio",
        "How full the fullest policy's queue is, by max_queued_steps or max_queued_bytes.",
        lambda now: max((each.queue_ratio for each in now.policies), default=0.0),
    ),
    (
        "clients",
        "Trainers whose streams are open, over all policies.",
        lambda now: sum(each.trainers for each in now.policies),
    ),
    (
        "clients_remembered",
        "Trainers whose last step is remembered, over the policies in memory.",
        lambda now: sum(each.known_trainers for each in now.policies if each.in_memory),
    ),
    ("event_loop_tasks", "Tasks of the event loop: a few, and a few for each stream.", lambda now: now.tasks),
    (
        "unpersisted_updates",
        "Steps applied that are not in Redis yet, over all policies.",
        lambda now: sum(each.unpersisted for each in now.policies),
    ),
    (
        "log_entries",
        "Steps in the logs in Redis, over all policies: what a restart replays.",
        lambda now: sum(each.log_entries for each in now.policies),
    ),
    (
        "log_longest_replay_seconds",
        "About how long the replay of the longest log would take.",
        lambda now: max((each.log_replay_s for each in now.policies), default=0.0),
    ),
    (
        "certificate_expiry_timestamp_seconds",
        "When the server's certificate ends.",
        lambda now: now.certificate_expires,
    ),
    (
        "own_redis_memory_bytes",
        "Resident memory of the server's own Redis.",
        lambda now: now.own_redis.memory_bytes if now.own_redis else None,
    ),
    (
        "own_redis_file_bytes",
        "Files of the server's own Redis.",
        lambda now: now.own_redis.file_bytes if now.own_redis else None,
    ),
    (
        "own_redis_disk_free_bytes",
        "What is left on the disk of the server's own Redis.",
        lambda now: now.own_redis.disk_free_bytes if now.own_redis else None,
    ),
)

USES: tuple[tuple[str, str, str, Callable[[ServerStatus], Use]], ...] = (
    ("active_streams", "Open training streams.", "max_streams", lambda now: now.streams),
    ("calls", "Calls under way, streams included.", "max_concurrent_rpcs", lambda now: now.calls),
    (
        "inflight_bytes",
        "Bytes of the steps that wait or are being worked on.",
        "max_inflight_bytes",
        lambda now: now.inflight_bytes,
    ),
    (
        "import_bytes",
        "Bytes of the policies that are being imported.",
        "max_import_bytes",
        lambda now: now.import_bytes,
    ),
    (
        "log_memory_bytes",
        "Memory of the log entries that are kept, over all policies.",
        "max_backlogs_bytes",
        lambda now: now.log_memory_bytes,
    ),
)
"""What is bounded in all: name, help, the setting that bounds it, and its use."""


class StatusCollector(Collector):
    """Yields the series of the status last given."""

    def __init__(self) -> None:
        self._status = ServerStatus()

    def show(self, status: ServerStatus) -> None:
        """Takes the status of now."""
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """The series."""
        status = self._status
        for name, help_text, value_of in GAUGES:
            value = value_of(status)
            yield GaugeMetricFamily(PREFIX + name, help_text, None if value is None else float(value))
        for name, help_text, setting, use_of in USES:
            use = use_of(status)
            yield GaugeMetricFamily(PREFIX + name, help_text, use.used)
            yield GaugeMetricFamily(f"{PREFIX}{name}_limit", f"The most that there may be: {setting}.", use.limit)
        yield from _labelled(status)


def _labelled(status: ServerStatus) -> Iterator[Metric]:
    unready = GaugeMetricFamily(
        f"{PREFIX}not_ready", "1 where the server is not ready because of this; /readyz says more.", labels=["reason"]
    )
    for check, trouble in status.checks.items():
        unready.add_metric([check], float(bool(trouble)))
    memory = GaugeMetricFamily(
        f"{PREFIX}device_memory_bytes", "Memory of the device, by state.", labels=["device", "state"]
    )
    for state, num_bytes in status.device_bytes.items():
        memory.add_metric([status.device, state], num_bytes)
    reloads = CounterMetricFamily(
        f"{PREFIX}reloads", "Files that were read again because they had changed.", labels=["file", "result"]
    )
    for file, counted in status.reloads.items():
        reloads.add_metric([file, "ok"], counted.ok)
        reloads.add_metric([file, "failed"], counted.failed)
    exits = CounterMetricFamily(
        f"{PREFIX}own_redis_exits", "How often the server's own Redis ended by itself.", status.own_redis_exits
    )
    yield from (unready, memory, reloads, exits)
