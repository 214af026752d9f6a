"""How the learning of each policy goes, read at scrape time; the number of policies shown is capped."""

import threading
from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from equipoise_server.engine import PolicyStatus
from equipoise_server.metrics.names import PREFIX

OTHER = "other"
"""Label of all policies beyond the cap, and of a policy that has this name."""


GAUGES: tuple[tuple[str, str, Callable[[PolicyStatus], float | None]], ...] = (
    ("policy_version", "Steps applied or refused so far.", lambda status: status.progress.version),
    (
        "weight_effective_examples_ratio",
        "Effective examples 1/sum(gamma^2) over the number of examples; 1 is uniform, near 0 is collapse.",
        lambda status: status.effective_examples / status.num_examples,
    ),
    (
        "weight_max",
        "Largest served weight among the last step's rows.",
        lambda status: status.progress.largest_weight,
    ),
    (
        "sim",
        "Mean over std of the last step's contributions: the Learning Law's evidence.",
        lambda status: status.progress.sim,
    ),
    (
        "positive_share",
        "Share of positive contributions in the last step.",
        lambda status: status.progress.positive_share,
    ),
    ("target_loss", "Last target loss reported, nats.", lambda status: status.progress.target_loss),
    ("guard_loss", "Last guard loss reported, nats.", lambda status: status.progress.guard_loss),
    ("guard_strength", "How far the guard pulls to uniform, 0 to 1.", lambda status: status.guard_strength),
    (
        "compression_ratio",
        "ln|V| over the mean of the target losses reported.",
        lambda status: status.compression_ratio,
    ),
    (
        "scored_ratio",
        "Share of examples scored at least once.",
        lambda status: status.scored_examples / status.num_examples,
    ),
)


class PolicyLabels:
    """Decides which policies get a label of their own: the first `limit` seen, until they vanish. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._shown: set[str] = set()
        self._lock = threading.Lock()

    def label(self, policy: str) -> str:
        """The policy's name, or `other` beyond the limit."""
        if policy in self._shown:
            return policy
        with self._lock:
            if len(self._shown) < self._limit and policy != OTHER:
                self._shown.add(policy)
                return policy
        return OTHER

    def shown(self) -> frozenset[str]:
        """Policies with a label of their own."""
        with self._lock:
            return frozenset(self._shown)

    def release(self, policies: Iterable[str]) -> None:
        """These vanished; their places are free."""
        with self._lock:
            self._shown.difference_update(policies)


class PolicyCollector(Collector):
    """Yields one gauge per value of the policies last given."""

    def __init__(self, labels: PolicyLabels) -> None:
        self._labels = labels
        self._policies: tuple[PolicyStatus, ...] = ()

    def show(self, policies: Iterable[PolicyStatus]) -> None:
        """Takes the loaded policies as they stand."""
        self._policies = tuple(policies)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The gauges; policies beyond the cap are only counted."""
        policies = self._policies
        shown = [status for status in policies if self._labels.label(status.name) != OTHER]
        for name, help_text, value_of in GAUGES:
            family = GaugeMetricFamily(PREFIX + name, help_text, labels=["policy"])
            for status in shown:
                value = value_of(status)
                if value is not None:
                    family.add_metric([status.name], value)
            yield family
        yield GaugeMetricFamily(f"{PREFIX}policies", "Policies in memory.", len(policies))
        yield GaugeMetricFamily(
            f"{PREFIX}policies_hidden",
            "Policies in memory without metrics of their own: beyond metrics_max_policies.",
            len(policies) - len(shown),
        )
