"""What each tenant takes at one moment; the number of tenants shown is capped."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from equipoise_server.metrics.names import OTHER, PREFIX

MAX_TENANTS = 20
"""Tenants with series of their own; the others are told together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantStatus:
    """What a tenant takes.

    Attributes:
        name: of the tenant.
        policies: his policies in memory.
        table_bytes: memory of their tables.
        calls: calls under way.
        max_calls: most of them.
        streams: streams among them.
        max_streams: most of them; None: no bound of his own.
        inflight_bytes: bytes of his steps under way.
    """

    name: str
    policies: int = 0
    table_bytes: int = 0
    calls: int = 0
    max_calls: int = 0
    streams: int = 0
    max_streams: int | None = None
    inflight_bytes: int = 0


GAUGES: tuple[tuple[str, str, Callable[[TenantStatus], float]], ...] = (
    ("tenant_policies", "Policies of a tenant in memory.", lambda status: status.policies),
    ("tenant_table_bytes", "Memory of the tables of a tenant's policies.", lambda status: status.table_bytes),
    ("tenant_calls", "Calls of a tenant under way, streams included.", lambda status: status.calls),
    ("tenant_streams", "Streams of a tenant that are open.", lambda status: status.streams),
    ("tenant_inflight_bytes", "Bytes of a tenant's steps under way.", lambda status: status.inflight_bytes),
)
LIMITS: tuple[tuple[str, str, Callable[[TenantStatus], float | None]], ...] = (
    ("tenant_calls_limit", "Most calls of a tenant at once.", lambda status: status.max_calls),
    ("tenant_streams_limit", "Most streams of a tenant at once, if it is set.", lambda status: status.max_streams),
)


class TenantLabels:
    """Decides which tenants have a label of their own: those that come first. Thread-safe."""

    def __init__(self, limit: int = MAX_TENANTS) -> None:
        self._limit = limit
        self._shown: dict[str, None] = {}
        self._lock = threading.Lock()

    @property
    def shown(self) -> Sequence[str]:
        """Tenants with a label of their own."""
        with self._lock:
            return tuple(self._shown)

    def label(self, tenant: str) -> str:
        """The tenant's name, or `other` beyond the limit."""
        with self._lock:
            if tenant in self._shown:
                return tenant
            if len(self._shown) < self._limit and tenant != OTHER:
                self._shown[tenant] = None
                return tenant
        return OTHER

    def keep(self, tenants: Iterable[str]) -> frozenset[str]:
        """Takes labels from all but these tenants, and gives them what is free; those that have a label no more."""
        known = dict.fromkeys(tenants)
        with self._lock:
            gone = frozenset(self._shown.keys() - known.keys())
            for tenant in gone:
                del self._shown[tenant]
        for tenant in known:
            self.label(tenant)
        return gone


class TenantCollector(Collector):
    """Yields the gauges of the tenants last given; none without tenants."""

    def __init__(self, labels: TenantLabels) -> None:
        self._labels = labels
        self._tenants: tuple[TenantStatus, ...] = ()

    def show(self, tenants: Iterable[TenantStatus]) -> None:
        """Takes what the tenants take now."""
        self._tenants = tuple(tenants)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The gauges; tenants beyond the cap are added up as `other`, where there are limits they have none."""
        tenants = self._tenants
        shown = frozenset(self._labels.shown)
        hidden = [status for status in tenants if status.name not in shown]
        for name, help_text, used in GAUGES:
            family = GaugeMetricFamily(PREFIX + name, help_text, labels=["tenant"])
            for status in tenants:
                if status.name in shown:
                    family.add_metric([status.name], used(status))
            if hidden:
                family.add_metric([OTHER], sum(map(used, hidden)))
            yield family
        for name, help_text, limit in LIMITS:
            family = GaugeMetricFamily(PREFIX + name, help_text, labels=["tenant"])
            for status in tenants:
                if status.name in shown and (value := limit(status)) is not None:
                    family.add_metric([status.name], value)
            yield family
