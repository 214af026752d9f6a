"""What tests of the metrics share: series as a dictionary, and policies and servers that stand in some way."""

from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from equipoise_server.engine import PolicyStatus, ServiceStatus
from equipoise_server.engine.progress import Progress
from equipoise_server.metrics import Metrics, ServerStatus, TenantStatus
from equipoise_server.rules import StrataReport, Stratum
from equipoise_server.security import Reloads
from equipoise_server.store import Usage

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]

OWN = "equipoise_server_"


def series_of(text: str) -> Series:
    """Every sample by its name and sorted labels."""
    families = text_string_to_metric_families(text)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def scraped(metrics: Metrics, status: ServerStatus | None = None) -> Series:
    metrics.scrape(lambda: status or ServerStatus())
    return series_of(metrics.exposition()[0].decode())


def value(series: Series, name: str, **labels: str) -> float | None:
    """Value of a series; names of ours without their prefix."""
    key = tuple(sorted(labels.items()))
    return series.get((name, key), series.get((OWN + name, key)))


def policy(name: str = "p", **facts: Any) -> PolicyStatus:
    """A policy with nothing special about it."""
    given: dict[str, Any] = {
        "rule": "ema_sign",
        "rule_kind": "table",
        "num_examples": 8,
        "reference_nats": None,
        "progress": Progress(version=1),
        "scored_examples": 2,
        "effective_examples": 4.0,
        "effective_ratio": 0.5,
        "keeps_scores": True,
        "guard_strength": 0.0,
        "table_bytes": 64,
    }
    return PolicyStatus(name=name, **(given | facts))


def served(name: str = "p", **facts: Any) -> ServiceStatus:
    """The same policy in service."""
    return ServiceStatus(policy=policy(name), **facts)


def strata_report() -> StrataReport:
    """Two strata, a good one and a bad one."""
    common = {"group": 0, "above_loss": None, "contributions": 50.0, "error": 0.1, "ratio": 1.0}
    return StrataReport(
        strata=(
            Stratum(stratum=0, examples=6, mean=0.2, z=2.0, weight=1.3, **common),  # type: ignore[arg-type]
            Stratum(stratum=1, examples=2, mean=-0.4, z=-4.0, weight=0.1, **common),  # type: ignore[arg-type]
        ),
        contrast=7.5,
    )


def full_house(num_policies: int, num_tenants: int) -> ServerStatus:
    """A server that shows all that it can show."""
    progress = Progress(
        version=7, target_loss=1.0, target_loss_sum=1.0, target_loss_count=1, guard_loss=1.0, sim=1.0,
        positive_share=0.5, largest_weight=2.0,
    )  # fmt: skip
    policies = tuple(
        ServiceStatus(policy=policy(f"t{number % num_tenants}-{number}", progress=progress, reference_nats=1.0,
                                    read_strata=strata_report),
                      stepped_at=1.0)
        for number in range(num_policies)
    )  # fmt: skip
    return ServerStatus(
        checks=dict.fromkeys(("drain", "startup", "redis"), ""),
        policies=policies,
        tenants=tuple(TenantStatus(name=f"t{number}", max_streams=1) for number in range(num_tenants)),
        device_bytes=dict.fromkeys(("tables", "free", "total", "reserved"), 1),
        certificate_expires=1.0,
        reloads={"tokens": Reloads(), "certificates": Reloads()},
        own_redis=Usage(memory_bytes=1, file_bytes=1, disk_free_bytes=1),
        own_redis_exits=0,
    )
