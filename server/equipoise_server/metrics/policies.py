"""How the learning of each policy goes, and how it is served, read at scrape time."""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from equipoise_server.metrics.labels import PolicyLabels
from equipoise_server.metrics.names import OTHER, PREFIX

if TYPE_CHECKING:  # the engine loads torch, which the parent of several processes does without
    from equipoise_server.engine import PolicyStatus, ServiceStatus

LEARNING: "tuple[tuple[str, str, Callable[[PolicyStatus], float | None]], ...]" = (
    ("policy_version", "Steps applied or refused so far.", lambda status: status.progress.version),
    ("num_examples", "N, the examples that the policy has a weight for.", lambda status: status.num_examples),
    (
        "weight_effective_examples_ratio",
        "Effective examples 1/sum(gamma^2) over the number of examples, for batch rules over the rows of the last step;"
        " 1 is uniform, near 0 is collapse.",
        lambda status: status.effective_ratio,
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
        "strata_contrast",
        "F, how much more the strata's mean contributions differ than chance explains (1); rule strata.",
        lambda status: report.contrast if (report := status.read_strata()) else None,
    ),
    (
        "scored_ratio",
        "Share of examples scored at least once; batch rules do not know.",
        lambda status: status.scored_examples / status.num_examples if status.keeps_scores else None,
    ),
)

SERVICE: "tuple[tuple[str, str, Callable[[ServiceStatus], float | None], Callable[[Iterable[float]], float]], ...]" = (
    (
        "durability_lag_seconds",
        "How long ago the oldest step was taken that Redis does not have yet; 0: it has all.",
        lambda status: status.lag_s,
        max,
    ),
    ("table_bytes", "Memory of a policy's tables; 0 while it rests in Redis.", lambda status: status.table_bytes, sum),
    ("log_bytes", "Bytes of a policy's log in Redis, about.", lambda status: status.log_bytes, sum),
    ("trainers", "Trainers of a policy whose streams are open.", lambda status: status.trainers, sum),
    (
        "last_step_timestamp_seconds",
        "When a policy took its last step.",
        lambda status: status.stepped_at,
        max,
    ),
)
"""With how the values of policies without a label of their own are put together."""


class PolicyCollector(Collector):
    """Yields one gauge per value of the policies last given."""

    def __init__(self, labels: PolicyLabels) -> None:
        self._labels = labels
        self._policies: tuple[ServiceStatus, ...] = ()

    def show(self, policies: "Iterable[ServiceStatus]") -> None:
        """Takes the policies as they stand: those in memory, and those that left it because nobody used them."""
        self._policies = tuple(policies)

    def collect(self) -> Iterator[Metric]:
        """The gauges; of policies beyond the cap, what matters of their service together."""
        policies, labelled = self._policies, self._labels.shown()
        shown = [status for status in policies if status.policy.name in labelled]
        hidden = [status for status in policies if status.policy.name not in labelled]
        for name, help_text, learning in LEARNING:
            family = GaugeMetricFamily(PREFIX + name, help_text, labels=["policy"])
            for status in shown:
                if (value := learning(status.policy)) is not None:
                    family.add_metric([status.policy.name], value)
            yield family
        yield from _rules(status.policy for status in shown)
        for name, help_text, service, together in SERVICE:
            family = GaugeMetricFamily(PREFIX + name, help_text, labels=["policy"])
            for status in shown:
                if (value := service(status)) is not None:
                    family.add_metric([status.policy.name], value)
            if rest := [value for status in hidden if (value := service(status)) is not None]:
                family.add_metric([OTHER], together(rest))
            yield family
        for name, help_text, count in (
            ("policies", "Policies in memory.", sum(status.in_memory for status in policies)),
            (
                "policies_resting",
                "Policies that left memory because nobody used them, and that no other server has taken since.",
                sum(not status.in_memory for status in policies),
            ),
            ("policies_hidden", "Policies without metrics of their own: beyond metrics_max_policies.", len(hidden)),
        ):
            yield GaugeMetricFamily(PREFIX + name, help_text, count)


def _rules(policies: "Iterable[PolicyStatus]") -> Iterator[Metric]:
    """Which rule each policy has, and how often its guard has looked whether the weights help."""
    info = GaugeMetricFamily(
        f"{PREFIX}policy_info",
        "1, with the policy's rule and its kind: table, batch or trajectory.",
        labels=["policy", "rule", "kind"],
    )
    trials = CounterMetricFamily(
        f"{PREFIX}guard_trials",
        "Trials of the guard that have ended: won by the policy's weights, or lost to uniform ones.",
        labels=["policy", "result"],
    )
    for status in policies:
        info.add_metric([status.name, status.rule, status.rule_kind], 1)
        for result, count in zip(("won", "lost"), status.guard_trials, strict=True):
            trials.add_metric([status.name, result], count)
    yield from (info, trials)
