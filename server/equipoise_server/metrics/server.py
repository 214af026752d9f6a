"""All metrics of one server: what the engine reports as it works, and what is read at scrape time."""

import asyncio
from collections.abc import Callable, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import choose_encoder

from equipoise_server.metrics.labels import PolicyLabels
from equipoise_server.metrics.merging import told
from equipoise_server.metrics.names import PREFIX, SECONDS_BUCKETS
from equipoise_server.metrics.policies import PolicyCollector
from equipoise_server.metrics.refusals import LEFT_REASONS, LOAD_REASONS, ReasonCounter
from equipoise_server.metrics.rpc import RpcMetrics
from equipoise_server.metrics.status import ServerStatus, StatusCollector
from equipoise_server.metrics.steps import StepMetrics
from equipoise_server.metrics.store import StoreMetrics
from equipoise_server.metrics.tenants import TenantCollector, TenantLabels

STAGES = ("decode", "queue", "compute", "log", "encode", "total")
"""Stages of a message's way."""


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
        max_policies: int = 34,
        tenant_of: Callable[[str], str] = lambda policy: "",
    ) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a `_created` beside each counter: twice the series
        registry = registry or CollectorRegistry()
        self.rpc = RpcMetrics(registry)
        self.store = StoreMetrics(registry)
        self._registry = registry
        self._labels = PolicyLabels(max_policies, tenant_of=tenant_of)
        self._tenant_labels = TenantLabels()
        self._steps = StepMetrics(registry, policies=self._labels, tenants=self._tenant_labels, tenant_of=tenant_of)
        self._policies = PolicyCollector(self._labels)
        self._tenants = TenantCollector(self._tenant_labels)
        self._now = StatusCollector()
        for collector in (self._policies, self._tenants, self._now):
            registry.register(collector)
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        Info(f"{PREFIX}build", "What runs here.", registry=registry).info(dict(build))
        stage_seconds = Histogram(
            f"{PREFIX}message_duration_seconds",
            "Time of a message in each stage of its way: decode, queue, compute, log, encode, and total.",
            ("method", "stage"),
            registry=registry,
            buckets=SECONDS_BUCKETS,
        )
        self._stage_seconds = {
            (method, stage): stage_seconds.labels(method, stage) for method in ("Exchange",) for stage in STAGES
        }
        self._lag_seconds = Histogram(
            f"{PREFIX}event_loop_lag_seconds", "How late the event loop wakes.", registry=registry,
            buckets=SECONDS_BUCKETS,
        )  # fmt: skip
        self._fenced = Counter(
            f"{PREFIX}fenced_writes", "Writes refused because another server owns the policy.", registry=registry
        )
        sweeps = Counter(f"{PREFIX}sweeps", "Sweeps that have ended, by result.", ("result",), registry=registry)
        self._sweeps = {ok: sweeps.labels("ok" if ok else "failed") for ok in (True, False)}
        self._load_seconds = Histogram(
            f"{PREFIX}load_duration_seconds",
            "Time from the first touch of a policy until it was in memory.",
            registry=registry,
            buckets=SECONDS_BUCKETS,
        )
        self._not_loaded = ReasonCounter(
            registry, "failed_loads", "Policies that could not be brought into memory, by reason.", LOAD_REASONS
        )
        self._left = ReasonCounter(
            registry, "policies_left", "Policies that left memory, by reason; FENCED: to another server.", LEFT_REASONS
        )

    def step(self, *, policy: str, outcome: str, rows: int) -> None:
        """A step was `applied`, found a `duplicate`, or `refused`; or a `read` was answered."""
        self._steps.step(policy=policy, outcome=outcome, rows=rows)

    def stage(self, *, method: str, stage: str, seconds: float) -> None:
        """A message of an RPC `method` spent `seconds` in `stage`."""
        self._stage_seconds[method, stage].observe(seconds)

    def batch(self, *, steps: int) -> None:
        """So many steps were applied in one device call."""
        self._steps.batch(steps=steps)

    def refused(self, *, reason: str) -> None:
        """A step was refused in its stream for `reason` (the ErrorInfo's)."""
        self.rpc.refused(reason=reason)

    def fenced(self) -> None:
        """A write was refused because another server owns the policy."""
        self._fenced.inc()

    def swept(self, *, ok: bool) -> None:
        """A sweep has ended, well or not."""
        self._sweeps[ok].inc()

    def loaded(self, *, seconds: float) -> None:
        """A policy came into memory."""
        self._load_seconds.observe(seconds)

    def not_loaded(self, *, reason: str) -> None:
        """A policy could not be brought into memory, for `reason`."""
        self._not_loaded.count(reason)

    def left(self, *, reason: str) -> None:
        """A policy has left memory, for `reason`."""
        self._left.count(reason)

    def event_loop_lag(self, seconds: float) -> None:
        """The event loop woke this much later than asked."""
        self._lag_seconds.observe(seconds)

    def scrape(self, take: Callable[[], ServerStatus]) -> None:
        """Takes the status for the next exposition; policies that are gone lose their series, and so do those of
        tenants that have more than their share of them.

        Called where `take` may be called: on the event loop.
        """
        known = self._labels.shown()  # before the status: a policy that is loaded meanwhile is not taken for gone
        status = take()
        gone = self._labels.share(
            (each.policy.name for each in status.policies if each.in_memory),
            resting=(each.policy.name for each in status.policies if not each.in_memory),
            known=known,
        )
        gone_tenants = self._tenant_labels.keep(each.name for each in status.tenants)
        self._steps.share(gone=gone, shown=self._labels.shown(), gone_tenants=gone_tenants)
        self._now.show(status)
        self._policies.show(status.policies)
        self._tenants.show(status.tenants)

    async def page(self, take: Callable[[], ServerStatus], *, accept: str = "") -> tuple[bytes, str]:
        """All series as of now: the status is taken on the event loop, where nothing moves meanwhile, and the text is
        made in a thread."""
        self.scrape(take)
        return await asyncio.to_thread(self.exposition, accept)

    async def told(self, take: Callable[[], ServerStatus]) -> tuple[bytes, str]:
        """The same for the parent of several processes, which adds them up."""
        self.scrape(take)
        return await asyncio.to_thread(lambda: told(self._registry.collect())), "application/json"

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """All series in the format that an HTTP `Accept` header asks for, and its content type. Any thread may call."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type
