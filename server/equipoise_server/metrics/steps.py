"""Steps as they are taken: by policy and by tenant, and how large they are."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram

from equipoise_server.metrics.labels import PolicyLabels
from equipoise_server.metrics.names import COUNT_BUCKETS, OTHER, PREFIX
from equipoise_server.metrics.tenants import TenantLabels

RESULTS = ("applied", "duplicate", "refused", "read")
"""What becomes of a step or read."""


@dataclass(frozen=True, slots=True)
class _Counters:
    """Where the steps of one policy are counted."""

    updates: dict[str, Counter]
    examples: Counter
    tenant: tuple[Counter, Counter] | None


class StepMetrics:
    """Counts steps. Thread-safe, and cheap: a policy's counters are looked up once between two scrapes.

    Args:
        registry: where the series are.
        policies: decides which policies have a label.
        tenants: decides which tenants have one.
        tenant_of: whose a policy is; empty: nobody's.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        policies: PolicyLabels,
        tenants: TenantLabels,
        tenant_of: Callable[[str], str],
    ) -> None:
        def counter(name: str, help_text: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, help_text, labels, registry=registry)

        self._policies = policies
        self._tenants = tenants
        self._tenant_of = tenant_of
        self._updates = counter("updates", "Steps and reads, by what became of them.", "policy", "result")
        self._examples = counter("examples", "Rows of the steps that were applied.", "policy")
        self._tenant_updates = counter("tenant_updates", "A tenant's steps and reads.", "tenant")
        self._tenant_examples = counter("tenant_examples", "Rows of a tenant's steps and reads.", "tenant")
        self._batch_examples = Histogram(
            f"{PREFIX}batch_examples", "Rows of a step.", registry=registry, buckets=COUNT_BUCKETS
        )
        self._batch_steps = Histogram(
            f"{PREFIX}batch_steps", "Steps applied in one device call.", registry=registry, buckets=COUNT_BUCKETS[:6]
        )
        self._counters: dict[str, _Counters] = {}
        self._of_label(OTHER)

    def step(self, *, policy: str, outcome: str, rows: int) -> None:
        """A step or read was answered with an outcome of `RESULTS`."""
        counters = self._counters.get(policy)
        if counters is None:
            counters = self._counters[policy] = self._counters_of(policy)
        counters.updates[outcome].inc()
        if outcome == "applied":
            counters.examples.inc(rows)
        if counters.tenant is not None:
            updates, examples = counters.tenant
            updates.inc()
            examples.inc(rows)
        self._batch_examples.observe(rows)

    def batch(self, *, steps: int) -> None:
        """So many steps were applied in one device call."""
        self._batch_steps.observe(steps)

    def share(self, *, gone: Iterable[str], shown: Iterable[str], gone_tenants: Iterable[str]) -> None:
        """Labels have been shared anew: series go and come with them, the new ones at 0, before their first step."""
        for policy in gone:
            for result in RESULTS:
                _remove(self._updates, policy, result)
            _remove(self._examples, policy)
        for tenant in gone_tenants:
            _remove(self._tenant_updates, tenant)
            _remove(self._tenant_examples, tenant)
        self._counters.clear()
        for policy in shown:
            self._of_label(policy)
        for tenant in self._tenants.shown:
            self._of_tenant(tenant)

    def _counters_of(self, policy: str) -> _Counters:
        updates, examples = self._of_label(self._policies.label(policy))
        tenant = self._tenant_of(policy)
        return _Counters(updates, examples, self._of_tenant(self._tenants.label(tenant)) if tenant else None)

    def _of_label(self, label: str) -> tuple[dict[str, Counter], Counter]:
        return {result: self._updates.labels(label, result) for result in RESULTS}, self._examples.labels(label)

    def _of_tenant(self, label: str) -> tuple[Counter, Counter]:
        return self._tenant_updates.labels(label), self._tenant_examples.labels(label)


def _remove(family: Counter, *labels: str) -> None:
    with suppress(KeyError):  # nothing was ever counted there
        family.remove(*labels)
