"""All metrics of one server: what the engine reports as it works, and what is read at scrape time."""

import time
from collections.abc import Callable, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import choose_encoder

from equipoise_server.metrics.names import COUNT_BUCKETS, PREFIX, SECONDS_BUCKETS
from equipoise_server.metrics.policies import PolicyCollector, PolicyLabels
from equipoise_server.metrics.rpc import RpcMetrics
from equipoise_server.metrics.status import ServerStatus, StatusCollector
from equipoise_server.metrics.store import StoreMetrics


class Metrics:
    """The server's metrics; implements the engine's Telemetry. Thread-safe, and cheap on the way of a step.

    Attributes:
        rpc: hears of RPCs.
        store: hears of commands to Redis.
    """

    def __init__(
        self,
        registry: CollectorRegistry | None = None,
        *,
        build: Mapping[str, str],
        max_policies: int = 100,
        clock: Callable[[], float] = time.time,
    ) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a `_created` beside each counter: twice the series
        registry = registry or CollectorRegistry()
        self.rpc = RpcMetrics(registry)
        self.store = StoreMetrics(registry)
        self._registry = registry
        self._clock = clock
        self._labels = PolicyLabels(max_policies)
        self._policies = PolicyCollector(self._labels)
        self._now = StatusCollector()
        for collector in (self._policies, self._now):
            registry.register(collector)
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        Info(f"{PREFIX}build", "What runs here.", registry=registry).info(dict(build))
        self._stage_seconds = Histogram(
            f"{PREFIX}message_duration_seconds",
            "Time of a message in each stage of its way: decode, queue, compute, log, encode, and total.",
            ("method", "stage"),
            registry=registry,
            buckets=SECONDS_BUCKETS,
        )
        self._lag_seconds = Histogram(
            f"{PREFIX}event_loop_lag_seconds", "How late the event loop wakes.", registry=registry,
            buckets=SECONDS_BUCKETS,
        )  # fmt: skip
        self._batch_examples = Histogram(
            f"{PREFIX}batch_examples", "Rows of a step.", registry=registry, buckets=COUNT_BUCKETS
        )
        self._batch_steps = Histogram(
            f"{PREFIX}batch_steps", "Steps applied in one device call.", registry=registry, buckets=COUNT_BUCKETS[:6]
        )
        self._updates = Counter(f"{PREFIX}updates", "Steps and reads.", ("policy", "result"), registry=registry)
        self._examples = Counter(f"{PREFIX}examples", "Rows of them.", ("policy", "result"), registry=registry)
        self._rejected = Counter(
            f"{PREFIX}rejected_values", "Requests refused for a value, by reason.", ("reason",), registry=registry
        )
        self._fenced = Counter(
            f"{PREFIX}fenced_writes", "Writes refused because another server owns the policy.", registry=registry
        )
        self._last_persist = Gauge(
            f"{PREFIX}last_persist_timestamp_seconds", "When a policy's log last reached Redis.", registry=registry
        )
        self._sweeps = Counter(f"{PREFIX}sweeps", "Sweeps that have ended, by result.", ("result",), registry=registry)
        for result in ("ok", "failed"):
            self._sweeps.labels(result)
        self._load_seconds = Histogram(
            f"{PREFIX}load_duration_seconds",
            "Time from the first touch of a policy until it was in memory.",
            registry=registry,
            buckets=SECONDS_BUCKETS,
        )
        self._counted: dict[tuple[str, str], tuple[Counter, Counter]] = {}

    def step(self, *, policy: str, outcome: str, rows: int) -> None:
        """A step was `applied`, found a `duplicate`, or `refused`; or a `read` was answered."""
        key = self._labels.label(policy), outcome
        counters = self._counted.get(key)
        if counters is None:
            counters = self._counted[key] = self._updates.labels(*key), self._examples.labels(*key)
        updates, examples = counters
        updates.inc()
        examples.inc(rows)
        self._batch_examples.observe(rows)

    def stage(self, *, method: str, stage: str, seconds: float) -> None:
        """A message of an RPC `method` spent `seconds` in `stage`."""
        self._stage_seconds.labels(method, stage).observe(seconds)

    def batch(self, *, steps: int) -> None:
        """So many steps were applied in one device call."""
        self._batch_steps.observe(steps)

    def rejected(self, *, reason: str) -> None:
        """A request was refused for `reason` (the ErrorInfo's)."""
        self._rejected.labels(reason).inc()

    def fenced(self) -> None:
        """A write was refused because another server owns the policy."""
        self._fenced.inc()

    def persisted(self) -> None:
        """A write of a policy's log reached the store."""
        self._last_persist.set(self._clock())

    def swept(self, *, ok: bool) -> None:
        """A sweep has ended, well or not."""
        self._sweeps.labels("ok" if ok else "failed").inc()

    def loaded(self, *, seconds: float) -> None:
        """A policy came into memory."""
        self._load_seconds.observe(seconds)

    def event_loop_lag(self, seconds: float) -> None:
        """The event loop woke this much later than asked."""
        self._lag_seconds.observe(seconds)

    def scrape(self, take: Callable[[], ServerStatus]) -> None:
        """Takes the status for the next exposition; policies that are gone lose their series.

        Called where `take` may be called: on the event loop.
        """
        known = self._labels.shown()  # before the status: a policy that is loaded meanwhile is not taken for gone
        status = take()
        gone = known - {policy.name for policy in status.policies}
        for policy, result in [key for key in list(self._counted) if key[0] in gone]:
            del self._counted[policy, result]
            self._updates.remove(policy, result)
            self._examples.remove(policy, result)
        self._labels.release(gone)
        self._now.show(status)
        self._policies.show(status.policies)

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """All series in the format that an HTTP `Accept` header asks for, and its content type. Any thread may call."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type
