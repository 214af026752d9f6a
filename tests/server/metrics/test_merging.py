"""The metrics of several processes as those of one server."""

from typing import Any

import pytest

from equipoise_server.engine import ServiceStatus
from equipoise_server.engine.progress import Progress
from equipoise_server.metrics import Metrics, ParentMetrics, ServerStatus, TenantStatus, Use
from equipoise_server.metrics.merging import OF_PARENT, POLICY_STATES, told
from tests.server.metrics.exposed import OWN, Series, full_house, policy, scraped, series_of, value


def one(**facts: Any) -> Metrics:
    return Metrics(build={"version": "1"}, **facts)


def page(metrics: Metrics, status: ServerStatus | None = None) -> bytes:
    metrics.scrape(lambda: status or ServerStatus())
    return told(metrics._registry.collect())


def merged(parent: ParentMetrics, *, running: int = 2, **status: Any) -> Series:
    return series_of(parent.exposition(ServerStatus(**status), running=running)[0].decode())


@pytest.fixture
def parent() -> ParentMetrics:
    return ParentMetrics(processes=2)


def test_two_equal_servers_have_the_series_of_one(parent: ParentMetrics) -> None:
    """All series that one server has, the same types, and every gauge has a rule."""
    alone, metrics = one(), one()
    status = full_house(3, 2)
    for number in range(2):
        parent.merged.told(number, page(metrics, status))
    both = merged(parent, own_redis=status.own_redis, own_redis_exits=0, checks=status.checks)
    expected = scraped(alone, status)
    added = {(f"{OWN}{name}", ()) for name in ("processes_running", "processes_wanted", "process_exits_total")}
    assert both.keys() - added == expected.keys()
    types = {line for line in parent.exposition(ServerStatus(), running=2)[0].decode().splitlines() if "# TYPE" in line}
    assert {line for line in alone.exposition()[0].decode().splitlines() if "# TYPE" in line} <= types


def test_amounts_are_added_and_of_the_rest_the_worst_counts(parent: ParentMetrics) -> None:
    for number, (streams, up, free) in enumerate([(3, True, 10), (4, False, 7)]):
        status = ServerStatus(
            streams=Use(streams, 100),
            redis_up=up,
            address_shared=not up,
            device_bytes={"free": free, "tables": free},
            certificate_expires=100.0 + number,
        )
        parent.merged.told(number, page(one(), status))
    series = merged(parent)
    assert value(series, "active_streams") == 7
    assert value(series, "redis_up") == 0
    assert value(series, "address_shared") == 1
    assert value(series, "certificate_expiry_timestamp_seconds") == 100
    assert value(series, "device_memory_bytes", device="cpu", state="free") == 7
    assert value(series, "device_memory_bytes", device="cpu", state="tables") == 17


def test_what_is_full_is_the_fullest_process(parent: ParentMetrics) -> None:
    """It refuses, however empty the others are: at half of all, one of two may have no room left."""
    for number, (streams, calls) in enumerate([(0, 0), (100, 30), (0, 10)]):
        tenants = (TenantStatus(name="t", calls=calls, max_calls=40),) if calls else ()
        status = ServerStatus(streams=Use(streams, 100), calls=Use(0, 50), tenants=tenants)
        parent.merged.told(number, page(one(), status))
    series = merged(parent)
    assert (value(series, "active_streams"), value(series, "active_streams_limit")) == (100, 100)
    assert (value(series, "calls"), value(series, "calls_limit")) == (0, 150)
    assert value(series, "tenant_calls", tenant="t") == 40
    assert value(series, "tenant_calls_limit", tenant="t") == pytest.approx(40 / 0.75)


def test_readiness_is_the_parents(parent: ParentMetrics) -> None:
    parent.merged.told(0, page(one(), ServerStatus(checks={"redis": "gone"})))
    series = merged(parent, checks={"drain": "", "processes": ""}, running=1)
    assert value(series, "ready") == 1
    assert value(series, "not_ready", reason="processes") == 0
    assert value(series, "not_ready", reason="redis") is None
    assert (value(series, "processes_running"), value(series, "processes_wanted")) == (1, 2)


def test_counters_and_histograms_are_sums_and_do_not_fall_with_a_process(parent: ParentMetrics) -> None:
    first, second = one(), one()
    for metrics, steps in ((first, 5), (second, 2)):
        for _ in range(steps):
            metrics.batch(steps=4)
        metrics.fenced()
    parent.merged.told(0, page(first))
    parent.merged.told(1, page(second))
    for _ in range(2):
        series = merged(parent)
        assert value(series, "fenced_writes_total") == 2
        assert value(series, "batch_steps_count") == 7
        assert value(series, "batch_steps_sum") == 28
        assert value(series, "batch_steps_bucket", le="4.0") == 7
        assert value(series, "batch_steps_bucket", le="1.0") == 0
        parent.merged.ended(0)  # and again: it never came back
    parent.merged.told(0, page(one()))  # one in its place
    assert value(merged(parent), "batch_steps_count") == 7
    second.batch(steps=1)
    parent.merged.told(1, page(second))
    assert value(merged(parent), "batch_steps_count") == 8


def test_a_process_that_does_not_answer_is_told_as_it_was(parent: ParentMetrics) -> None:
    metrics = one()
    metrics.fenced()
    parent.merged.told(0, page(metrics))
    parent.merged.told(1, page(metrics))
    for _ in range(3):
        parent.merged.told(1, page(metrics))
        assert value(merged(parent), "fenced_writes_total") == 2


def policies(*names: str, version: int, **facts: Any) -> ServerStatus:
    progress = Progress(version=version, sim=float(version))
    return ServerStatus(
        policies=tuple(ServiceStatus(policy=policy(name, progress=progress)) for name in names), **facts
    )


def test_a_policy_is_shown_by_the_process_that_has_its_newest_version(parent: ParentMetrics) -> None:
    """It rests at one process, as it stood when it left, and is served by the other."""
    parent.merged.told(0, page(one(), policies("p", version=3)))
    parent.merged.told(1, page(one(), policies("p", "q", version=9)))
    series = merged(parent)
    assert value(series, "sim", policy="p") == 9
    assert value(series, "policy_version", policy="p") == 9
    assert value(series, "num_examples", policy="p") == 8
    assert value(series, "table_bytes", policy="p") == value(series, "table_bytes", policy="q")
    assert value(series, "guard_trials_total", policy="p", result="won") == 0


def test_steps_of_a_policy_that_has_moved_stay_counted_until_it_is_gone(parent: ParentMetrics) -> None:
    before, after = one(), one()
    here, nowhere = policies("p", version=3), ServerStatus()
    page(before, here)
    for _ in range(3):
        before.step(policy="p", outcome="applied", rows=2)
    parent.merged.told(0, page(before, here))
    parent.merged.told(1, page(after, nowhere))
    applied = {"policy": "p", "result": "applied"}
    assert value(merged(parent), "updates_total", **applied) == 3
    after.step(policy="p", outcome="applied", rows=2)
    parent.merged.told(1, page(after, here))
    parent.merged.told(0, page(before, nowhere))
    assert value(merged(parent), "updates_total", **applied) == 4
    parent.merged.told(1, page(after, nowhere))
    assert value(merged(parent), "updates_total", **applied) is None
    parent.merged.told(1, page(after, here))
    assert value(merged(parent), "updates_total", **applied) == 0  # it has begun anew


def test_names_are_of_metrics_that_there_are() -> None:
    parent = ParentMetrics(processes=2)
    names = {family.name for family in one()._registry.collect()}
    names |= {family.name for family in parent._registry.collect()}
    status = full_house(3, 2)
    metrics = one()
    metrics.scrape(lambda: status)
    names |= {family.name for family in metrics._registry.collect()}
    assert names >= OF_PARENT
    assert names >= POLICY_STATES
