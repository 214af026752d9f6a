"""The metrics of a server's processes as those of one server.

Counters and histograms are added up, and never fall: what a process had counted stays when it ends. Of gauges, each has
a rule. A policy's gauges are those of the process that serves it: while it moves, the one that has its newest version.
A limit is what there could be in all, if more came to each process as it has come so far.
"""

import json
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector, disable_created_metrics
from prometheus_client import Counter as CounterFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from equipoise_server.metrics.names import OTHER, PREFIX
from equipoise_server.metrics.status import ServerStatus, StatusCollector
from equipoise_server.metrics.store import StoreMetrics

Rule: TypeAlias = Callable[[Iterable[float]], float]

_OURS: Mapping[str, Rule] = {
    **dict.fromkeys(
        (
            "active_streams", "calls", "clients", "clients_remembered", "event_loop_tasks", "import_bytes",
            "inflight_bytes", "loading_entries", "loading_entries_replayed", "loading_pages", "loading_pages_read",
            "log_bytes", "log_entries", "log_memory_bytes", "policies", "policies_hidden", "policies_loading",
            "policies_resting", "queue_depth", "table_bytes", "tenant_calls", "tenant_inflight_bytes",
            "tenant_policies", "tenant_streams", "tenant_table_bytes", "trainers", "unpersisted_updates",
        ),
        sum,
    ),
    **dict.fromkeys(
        (
            "address_shared", "build", "durability_lag_seconds", "last_step_timestamp_seconds",
            "loading_longest_seconds", "log_longest_replay_seconds", "queue_fullest_ratio",
        ),
        max,
    ),
    **dict.fromkeys(("certificate_expiry_timestamp_seconds", "redis_up"), min),
}  # fmt: skip

RULES: Mapping[str, Rule] = {
    **{PREFIX + name: rule for name, rule in _OURS.items()},
    "process_max_fds": min,
    "process_open_fds": max,  # each has its own limit: the fullest counts
    "process_resident_memory_bytes": sum,
    "process_start_time_seconds": min,
    "process_virtual_memory_bytes": sum,
}
"""How the values of several processes become one, by the name of the gauge; what is worst, where it is no amount."""

DEVICE_RULES: Mapping[str, Rule] = {"tables": sum, "reserved": sum, "free": min, "total": max}
"""The same for the memory of the device, which all processes see, by its state."""

LIMIT = "_limit"
"""End of the name of a gauge that says how much there may be of the one before it."""

POLICY_STATES = frozenset(
    PREFIX + name
    for name in (
        "compression_ratio", "guard_loss", "guard_strength", "guard_trials", "num_examples", "policy_info",
        "policy_version", "positive_share", "scored_ratio", "sim", "strata_contrast", "target_loss",
        "weight_effective_examples_ratio", "weight_max",
    )
)  # fmt: skip
"""What tells of a policy's state, and moves with it, counters too."""

OF_SEVERAL = tuple(PREFIX + name for name in ("process_exits", "processes_running", "processes_wanted"))
"""What there is of several processes alone."""

OF_PARENT = frozenset(OF_SEVERAL) | frozenset(
    PREFIX + name
    for name in (
        "draining", "not_ready", "own_redis_disk_free_bytes", "own_redis_exits", "own_redis_file_bytes",
        "own_redis_memory_bytes", "ready",
        "redis_sync_failing",
    )
)  # fmt: skip
"""What the parent alone knows."""

_PARENT = -1

_Key: TypeAlias = tuple[str, tuple[tuple[str, str], ...]]
_Samples: TypeAlias = dict[_Key, float]


@dataclass(frozen=True, slots=True)
class _Family:
    kind: str
    help_text: str
    samples: _Samples

    @property
    def counts(self) -> bool:
        return self.kind in ("counter", "histogram")


_Page: TypeAlias = Mapping[str, _Family]


class MergedMetrics:
    """Adds up what processes tell. Not thread-safe.

    A process that does not answer is told as it last was.
    """

    def __init__(self) -> None:
        self._pages: dict[int, _Page] = {}
        self._ended: dict[str, _Samples] = {}

    def told(self, process: int, page: bytes) -> None:
        """Takes what a process tells: its families, as `told` writes them."""
        families = json.loads(page)
        self._take(
            process,
            {
                name: _Family(kind, help_text, {(sample, _labels(labels)): value for sample, labels, value in samples})
                for name, kind, help_text, samples in families
            },
        )

    def ended(self, process: int) -> None:
        """A process has ended; one that comes in its place begins at 0."""
        self._take(process, {})
        self._pages.pop(process, None)

    def families(self, parent: Iterable[Metric] = ()) -> Iterator[Metric]:
        """All series; `parent` are its own, of which those count that it alone knows, and those of a process."""
        pages = {number: _without(page, OF_PARENT) for number, page in self._pages.items()}
        pages[_PARENT] = {
            name: family for name, family in _page(parent).items() if name in OF_PARENT or name.startswith("process_")
        }
        owners = self._owners()
        for name in dict.fromkeys(name for page in pages.values() for name in page):
            told = {number: page[name] for number, page in pages.items() if name in page}
            family = next(iter(told.values()))
            summed = family.counts and name not in POLICY_STATES
            if summed:
                samples = self._counted(name, told.values())
            elif name.endswith(LIMIT):
                samples = _limited(name, pages.values())
            else:
                samples = _measured(name, told, owners)
            metric = Metric(name, family.help_text, family.kind)
            for (sample, labels), value in samples.items():
                metric.add_sample(sample, dict(labels), value)
            yield metric

    def _take(self, process: int, page: _Page) -> None:
        """What counters had and have no more is kept: else their sum would fall, which means that they began anew."""
        for name, before in self._pages.get(process, {}).items():
            if before.counts and name not in POLICY_STATES:
                now = page[name].samples if name in page else {}
                kept = self._ended.setdefault(name, {})
                for key, value in before.samples.items():
                    if now.get(key, -1.0) < value:
                        kept[key] = kept.get(key, 0.0) + value
        self._pages[process] = page

    def _owners(self) -> dict[str, int]:
        """The process with the newest version of each policy that is shown."""
        newest: dict[str, tuple[float, int]] = {}
        for process, page in self._pages.items():
            if versions := page.get(f"{PREFIX}policy_version"):
                for (_, labels), version in versions.samples.items():
                    policy = dict(labels)["policy"]
                    newest[policy] = max(newest.get(policy, (-1.0, 0)), (version, process))
        return {policy: process for policy, (_, process) in newest.items()}

    def _counted(self, name: str, told: Iterable[_Family]) -> _Samples:
        total: _Samples = {}
        for family in told:
            for key, value in family.samples.items():
                total[key] = total.get(key, 0.0) + value
        kept = self._ended.get(name, {})
        for key in list(kept):
            if key in total:
                total[key] += kept[key]
            elif any(label in ("policy", "tenant") for label, _ in key[1]):
                del kept[key]  # of somebody who has gone: series do not pile up
            else:
                total[key] = kept[key]
        return total


class ParentMetrics:
    """What the parent of several processes tells of the whole server.

    Attributes:
        merged: what the processes have told.
        store: hears of the disk of the parent's own Redis.
    """

    def __init__(self, *, processes: int) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # as `Metrics` does
        self.merged = MergedMetrics()
        self._registry = CollectorRegistry()
        self.store = StoreMetrics(self._registry)
        self._now = StatusCollector()
        self._registry.register(self._now)
        ProcessCollector(registry=self._registry)
        self._running = Gauge(
            f"{PREFIX}processes_running", "Processes of the server that serve.", registry=self._registry
        )
        Gauge(
            f"{PREFIX}processes_wanted",
            "Processes that the server should have, as its setting says.",
            registry=self._registry,
        ).set(processes)
        self._exits = CounterFamily(
            f"{PREFIX}process_exits", "Processes that have ended by themselves, and were replaced.",
            registry=self._registry,
        )  # fmt: skip

    def exited(self) -> None:
        """A process has ended by itself."""
        self._exits.inc()

    def exposition(self, status: ServerStatus, *, running: int, accept: str = "") -> tuple[bytes, str]:
        """All series in the format that an HTTP `Accept` header asks for, and its content type.

        Args:
            status: of the server, as far as the parent knows.
            running: processes that serve.
            accept: the header.
        """
        self._running.set(running)
        self._now.show(status)
        encode, content_type = choose_encoder(accept)
        shown = CollectorRegistry(auto_describe=False)
        shown.register(_Shown(list(self.merged.families(self._registry.collect()))))
        return encode(shown), content_type


class _Shown(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def told(families: Iterable[Metric]) -> bytes:
    """Families as one process tells its parent: as JSON, since Prometheus' own text takes ten times as long to read."""
    rows = [
        (each.name, each.type, each.documentation, [(name, labels, value) for name, labels, value, *_ in each.samples])
        for each in families
    ]
    return json.dumps(rows).encode()


def _page(families: Iterable[Metric]) -> _Page:
    return {
        family.name: _Family(
            family.type,
            family.documentation,
            {(sample.name, _labels(sample.labels)): sample.value for sample in family.samples},
        )
        for family in families
    }


def _labels(labels: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(labels.items()))


def _without(page: _Page, names: Container[str]) -> _Page:
    return {name: family for name, family in page.items() if name not in names}


def _measured(name: str, told: Mapping[int, _Family], owners: Mapping[str, int]) -> _Samples:
    found: dict[_Key, list[float]] = {}
    for number, family in told.items():
        for key, value in family.samples.items():
            policy = dict(key[1]).get("policy", OTHER)
            if policy == OTHER or owners.get(policy, number) == number:
                found.setdefault(key, []).append(value)
    return {key: _rule(name, key)(values) for key, values in found.items()}


def _limited(name: str, pages: Iterable[_Page]) -> _Samples:
    """How much there may be in all, shared out as it is now: X over X_limit is then what the fullest process has.

    Each process has a limit of its own, and refuses what is beyond it, however empty the others are.
    """
    used_name = name.removesuffix(LIMIT)
    total: _Samples = {}
    each: dict[_Key, list[tuple[float, float]]] = {}
    for page in pages:
        used = page[used_name].samples if used_name in page else {}
        for (_, labels), value in used.items():
            total[name, labels] = total.get((name, labels), 0.0) + value
        for (sample, labels), limit in page[name].samples.items() if name in page else ():
            each.setdefault((sample, labels), []).append((limit, used.get((used_name, labels), 0.0)))
    return {
        key: min((limit * total[key] / used for limit, used in pairs if used), default=sum(limit for limit, _ in pairs))
        for key, pairs in each.items()
    }


def _rule(name: str, key: _Key) -> Rule:
    if name in POLICY_STATES or name in OF_PARENT:
        return max  # of one
    if name == f"{PREFIX}device_memory_bytes":
        return DEVICE_RULES[dict(key[1])["state"]]
    return RULES[name]
