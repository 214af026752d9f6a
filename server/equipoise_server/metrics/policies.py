"""How the learning of each policy goes, read at scrape time; the number of policies shown is capped."""

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from equipoise_server.metrics.names import PREFIX

OTHER = "other"
"""Label of all policies beyond the cap, and of a policy that has this name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyFacts:
    """A loaded policy as it stands; None where it has no such value yet.

    Attributes:
        name: the policy.
        version: steps applied or refused so far.
        effective_ratio: effective examples over N, in (0, 1].
        scored_ratio: share of examples scored at least once, in [0, 1].
        largest_weight: largest served weight among the last step's rows.
        sim: mean/std of the last step's contributions (paper, section 4).
        positive_share: share of positive contributions in the last step, in [0, 1].
        target_loss: last reported, nats.
        guard_loss: last reported, nats.
        guard_strength: pull to uniform, in [0, 1].
        compression_ratio: ln|V| over the mean reported target loss.
    """

    name: str
    version: int
    effective_ratio: float
    scored_ratio: float
    guard_strength: float
    largest_weight: float | None = None
    sim: float | None = None
    positive_share: float | None = None
    target_loss: float | None = None
    guard_loss: float | None = None
    compression_ratio: float | None = None


GAUGES: tuple[tuple[str, str, Callable[[PolicyFacts], float | None]], ...] = (
    ("policy_version", "Steps applied or refused so far.", lambda facts: facts.version),
    (
        "weight_effective_examples_ratio",
        "Effective examples 1/sum(gamma^2) over the number of examples; 1 is uniform, near 0 is collapse.",
        lambda facts: facts.effective_ratio,
    ),
    ("weight_max", "Largest served weight among the last step's rows.", lambda facts: facts.largest_weight),
    ("sim", "Mean over std of the last step's contributions: the Learning Law's evidence.", lambda facts: facts.sim),
    ("positive_share", "Share of positive contributions in the last step.", lambda facts: facts.positive_share),
    ("target_loss", "Last target loss reported, nats.", lambda facts: facts.target_loss),
    ("guard_loss", "Last guard loss reported, nats.", lambda facts: facts.guard_loss),
    ("guard_strength", "How far the guard pulls to uniform, 0 to 1.", lambda facts: facts.guard_strength),
    ("compression_ratio", "ln|V| over the mean of the target losses reported.", lambda facts: facts.compression_ratio),
    ("scored_ratio", "Share of examples scored at least once.", lambda facts: facts.scored_ratio),
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
    """Yields one gauge per fact of the policies last given."""

    def __init__(self, labels: PolicyLabels) -> None:
        self._labels = labels
        self._policies: tuple[PolicyFacts, ...] = ()

    def show(self, policies: Iterable[PolicyFacts]) -> None:
        """Takes the loaded policies as they stand."""
        self._policies = tuple(policies)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The gauges; policies beyond the cap are only counted."""
        policies = self._policies
        shown = [facts for facts in policies if self._labels.label(facts.name) != OTHER]
        for name, help_text, value_of in GAUGES:
            family = GaugeMetricFamily(PREFIX + name, help_text, labels=["policy"])
            for facts in shown:
                value = value_of(facts)
                if value is not None:
                    family.add_metric([facts.name], value)
            yield family
        yield GaugeMetricFamily(f"{PREFIX}policies", "Policies in memory.", len(policies))
        yield GaugeMetricFamily(
            f"{PREFIX}policies_hidden",
            "Policies in memory without metrics of their own: beyond metrics_max_policies.",
            len(policies) - len(shown),
        )
