"""Metrics: the promised names, every RPC from 0, one gauge per policy while it lives, and a capped number of them."""

import asyncio
import contextlib
import threading
from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise_server.engine import ServiceStatus
from equipoise_server.engine.progress import Progress
from equipoise_server.metrics import LoadingStatus, Metrics, ServerStatus, TenantStatus, Use, measure_lag
from equipoise_server.metrics.labels import PolicyLabels
from equipoise_server.metrics.names import OTHER
from equipoise_server.metrics.refusals import ACCESS_REASONS, LEFT_REASONS, LOAD_REASONS, STATE_REASONS, VALUE_REASONS
from equipoise_server.metrics.store import COMMANDS, KINDS
from equipoise_server.metrics.tenants import MAX_TENANTS
from equipoise_server.security import Reloads
from equipoise_server.settings import Settings
from equipoise_server.store import Usage
from tests.server.metrics.exposed import OWN, Series, full_house, policy, scraped, series_of, served, value

RESULTS = ("applied", "duplicate", "refused", "read")
EXCHANGE = "/equipoise.v1.PolicyService/Exchange"


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(build={"version": "1.2.3"}, max_policies=2)


def rpc(method: str, kind: str, **more: str) -> dict[str, str]:
    return {"grpc_service": "equipoise.v1.PolicyService", "grpc_method": method, "grpc_type": kind, **more}


def test_every_method_and_code_is_there_before_the_first_call(metrics: Metrics) -> None:
    series = scraped(metrics)
    handled = {labels: v for (name, labels), v in series.items() if name == "grpc_server_handled_total"}
    assert set(handled.values()) == {0.0}
    codes = {dict(labels)["grpc_code"] for labels in handled}
    assert len(codes) == 17
    assert {"OK", "Canceled", "InvalidArgument", "Unauthenticated"} <= codes
    assert value(series, "grpc_server_started_total", **rpc("WatchPolicy", "server_stream")) == 0
    assert value(series, "grpc_server_started_total", **rpc("ImportPolicy", "client_stream")) == 0
    assert value(series, "grpc_server_started_total", **rpc("GetPolicy", "unary")) == 0


def test_an_rpc_is_counted_under_the_spellings_that_dashboards_expect(metrics: Metrics) -> None:
    hears = metrics.rpc
    hears.rpc_started(method=EXCHANGE, kind="bidi_stream")
    hears.message_received(method=EXCHANGE, kind="bidi_stream")
    hears.message_received(method=EXCHANGE, kind="bidi_stream")
    hears.message_sent(method=EXCHANGE, kind="bidi_stream")
    hears.rpc_handled(method=EXCHANGE, kind="bidi_stream", code="FAILED_PRECONDITION", seconds=0.3)
    series, labels = scraped(metrics), rpc("Exchange", "bidi_stream")
    assert value(series, "grpc_server_started_total", **labels) == 1
    assert value(series, "grpc_server_msg_received_total", **labels) == 2
    assert value(series, "grpc_server_msg_sent_total", **labels) == 1
    assert value(series, "grpc_server_handled_total", **labels, grpc_code="FailedPrecondition") == 1
    assert value(series, "grpc_server_handling_seconds_sum", **labels) == 0.3


def test_callers_cannot_make_up_series(metrics: Metrics) -> None:
    before = set(scraped(metrics))
    for number in range(100):
        metrics.rpc.rpc_started(method=f"/made.Up/Method{number}", kind="unary")
        metrics.rpc.rpc_handled(method=f"/made.Up/Method{number}", kind="unary", code="UNIMPLEMENTED", seconds=0.0)
    after = scraped(metrics)
    other = {"grpc_service": "other", "grpc_method": "other", "grpc_type": "unary"}
    assert set(after) == before
    assert value(after, "grpc_server_handled_total", **other, grpc_code="Unimplemented") == 100


def test_the_names_of_the_service_are_as_promised(metrics: Metrics) -> None:
    metrics.step(policy="p", outcome="applied", rows=64)
    metrics.stage(method="Exchange", stage="compute", seconds=0.001)
    metrics.batch(steps=3)
    metrics.fenced()
    metrics.swept(ok=False)
    metrics.loaded(seconds=2.0)
    metrics.event_loop_lag(0.002)
    metrics.store.command("append", 0.0005)
    metrics.store.error("timeout")
    metrics.store.syncs(failing=True)
    series = scraped(metrics, ServerStatus(policies=(served("p"),)))
    assert value(series, "updates_total", policy="p", result="applied") == 1
    assert value(series, "examples_total", policy="p") == 64
    assert value(series, "batch_examples_sum") == 64
    assert value(series, "batch_steps_sum") == 3
    assert value(series, "message_duration_seconds_sum", method="Exchange", stage="compute") == 0.001
    assert value(series, "fenced_writes_total") == 1
    assert value(series, "sweeps_total", result="failed") == 1
    assert value(series, "load_duration_seconds_sum") == 2.0
    assert value(series, "event_loop_lag_seconds_sum") == 0.002
    assert value(series, "redis_command_duration_seconds_sum", command="append") == 0.0005
    assert value(series, "redis_errors_total", kind="timeout") == 1
    assert value(series, "redis_sync_failing") == 1
    assert value(series, "build_info", version="1.2.3") == 1
    assert value(series, "process_resident_memory_bytes")


def test_the_state_of_the_server_is_shown(metrics: Metrics) -> None:
    status = ServerStatus(
        checks={"startup": "", "redis": "redis has not been reached yet", "drain": "the server is stopping"},
        policies=(
            served("a", trainers=2, known_trainers=3, queued_steps=4, queue_ratio=0.25, unpersisted=8, log_entries=10),
            served("b", trainers=1, known_trainers=1, queued_steps=1, queue_ratio=0.75, log_replay_s=1.5),
            served("c", in_memory=False, known_trainers=9, log_entries=5),
        ),
        loading=LoadingStatus(policies=2, pages=10, read_pages=4, entries=100, replayed=30, longest_s=7.5),
        streams=Use(6, 4096),
        calls=Use(7, 8192),
        inflight_bytes=Use(5, 512),
        import_bytes=Use(1, 2),
        log_memory_bytes=Use(3, 4),
        tasks=11,
        device="cpu",
        device_bytes={"tables": 64, "free": 1000},
        redis_up=True,
        draining=True,
        certificate_expires=99.5,
        reloads={"tokens": Reloads(ok=2, failed=1)},
        own_redis=Usage(memory_bytes=10, file_bytes=20, disk_free_bytes=30),
        own_redis_exits=4,
    )
    series = scraped(metrics, status)
    expected = {
        "ready": 0, "draining": 1, "redis_up": 1, "policies": 2, "policies_resting": 1, "policies_hidden": 1,
        "policies_loading": 2, "loading_pages": 10, "loading_pages_read": 4, "loading_entries": 100,
        "loading_entries_replayed": 30, "loading_longest_seconds": 7.5, "queue_depth": 5, "queue_fullest_ratio": 0.75,
        "clients": 3, "clients_remembered": 4, "unpersisted_updates": 8, "log_entries": 15,
        "log_longest_replay_seconds": 1.5, "event_loop_tasks": 11, "certificate_expiry_timestamp_seconds": 99.5,
        "own_redis_memory_bytes": 10, "own_redis_file_bytes": 20, "own_redis_disk_free_bytes": 30,
        "own_redis_exits_total": 4, "active_streams": 6, "active_streams_limit": 4096, "calls": 7, "calls_limit": 8192,
        "inflight_bytes": 5, "inflight_bytes_limit": 512, "import_bytes": 1, "import_bytes_limit": 2,
        "log_memory_bytes": 3, "log_memory_bytes_limit": 4,
    }  # fmt: skip
    assert {name: value(series, name) for name in expected} == expected
    unready = {reason: value(series, "not_ready", reason=reason) for reason in ("startup", "redis", "drain")}
    assert unready == {"startup": 0, "redis": 1, "drain": 1}
    assert value(series, "device_memory_bytes", device="cpu", state="free") == 1000
    assert [value(series, "reloads_total", file="tokens", result=result) for result in ("ok", "failed")] == [2, 1]


@pytest.mark.parametrize(
    ("rule", "kind"), [("ema_sign", "table"), ("boltzmann", "batch"), ("trajectory", "trajectory")]
)
def test_a_policy_shows_its_rule_and_the_trials_of_its_guard(metrics: Metrics, rule: str, kind: str) -> None:
    status = policy("p", rule=rule, rule_kind=kind, guard_trials=(3, 1), num_examples=8)
    series = scraped(metrics, ServerStatus(policies=(ServiceStatus(policy=status),)))
    assert value(series, "policy_info", policy="p", rule=rule, kind=kind) == 1
    assert [value(series, "guard_trials_total", policy="p", result=result) for result in ("won", "lost")] == [3, 1]
    assert value(series, "num_examples", policy="p") == 8


def test_a_server_that_has_only_begun_shows_what_there_is(metrics: Metrics) -> None:
    series = scraped(metrics, ServerStatus(checks={"startup": "the server is starting"}))
    assert value(series, "ready") == 0
    assert value(series, "not_ready", reason="startup") == 1
    assert value(series, "certificate_expiry_timestamp_seconds") is None
    assert value(series, "own_redis_exits_total") is None


def test_every_counter_is_there_before_its_first_event(metrics: Metrics) -> None:
    """Else `increase` misses that event."""
    series = scraped(metrics, ServerStatus(policies=(served("p"),)))
    zeros = [
        *(("updates_total", {"policy": name, "result": result}) for name in ("p", OTHER) for result in RESULTS),
        *(("examples_total", {"policy": name}) for name in ("p", OTHER)),
        *(("auth_failures_total", {"reason": reason}) for reason in ACCESS_REASONS),
        *(("rejected_values_total", {"reason": reason}) for reason in VALUE_REASONS),
        *(("refusals_total", {"reason": reason}) for reason in STATE_REASONS),
        *(("policies_left_total", {"reason": reason}) for reason in LEFT_REASONS),
        *(("failed_loads_total", {"reason": reason}) for reason in LOAD_REASONS),
        *(("redis_errors_total", {"kind": kind}) for kind in KINDS),
        *(("redis_command_duration_seconds_count", {"command": command}) for command in COMMANDS),
        *(("sweeps_total", {"result": result}) for result in ("ok", "failed")),
        ("fenced_writes_total", {}),
        ("redis_sync_failing", {}),
    ]
    assert {name: value(series, name, **labels) for name, labels in zeros if value(series, name, **labels) != 0} == {}


@pytest.mark.parametrize(
    ("reason", "family"),
    [
        *((reason, "auth_failures_total") for reason in ACCESS_REASONS),
        *((reason, "rejected_values_total") for reason in VALUE_REASONS),
        *((reason, "refusals_total") for reason in STATE_REASONS),
    ],
)
def test_a_refusal_is_counted_once_in_the_family_of_its_kind(metrics: Metrics, reason: str, family: str) -> None:
    metrics.refused(reason=reason)
    series = scraped(metrics)
    assert value(series, family, reason=reason) == 1
    counted = [
        number
        for (name, _), number in series.items()
        if name in {f"{OWN}auth_failures_total", f"{OWN}rejected_values_total", f"{OWN}refusals_total"}
    ]
    assert sum(counted) == 1


def test_nothing_that_is_made_up_makes_series(metrics: Metrics) -> None:
    before = set(scraped(metrics))
    for number in range(100):
        metrics.refused(reason=f"MADE_UP_{number}")
        metrics.left(reason=f"MADE_UP_{number}")
        metrics.not_loaded(reason=f"MADE_UP_{number}")
        metrics.store.command(f"made_up_{number}", 0.1)
        metrics.store.error(f"made_up_{number}")
    after = scraped(metrics)
    assert set(after) == before
    for name in ("refusals_total", "policies_left_total", "failed_loads_total"):
        assert value(after, name, reason="OTHER") == 100
    assert value(after, "redis_errors_total", kind=OTHER) == 100


def test_a_policy_shows_what_it_knows_and_only_that(metrics: Metrics) -> None:
    grown = policy(
        "grown",
        reference_nats=6.0,
        progress=Progress(
            version=9,
            largest_weight=4.0,
            sim=2.0,
            positive_share=0.625,
            target_loss=1.5,
            target_loss_sum=6.0,
            target_loss_count=3,
            guard_loss=1.75,
        ),
        scored_examples=6,
        effective_ratio=0.875,
        guard_strength=0.125,
    )
    service = ServiceStatus(policy=grown, lag_s=1.25, log_bytes=100, trainers=3, stepped_at=1234.5)
    series = scraped(metrics, ServerStatus(policies=(served("young"), service)))
    expected = {
        "policy_version": 9, "weight_effective_examples_ratio": 0.875, "weight_max": 4.0, "sim": 2.0,
        "positive_share": 0.625, "target_loss": 1.5, "guard_loss": 1.75, "guard_strength": 0.125,
        "compression_ratio": 3.0, "scored_ratio": 0.75, "durability_lag_seconds": 1.25, "table_bytes": 64,
        "log_bytes": 100, "trainers": 3, "last_step_timestamp_seconds": 1234.5,
    }  # fmt: skip
    assert {name: value(series, name, policy="grown") for name in expected} == expected
    assert value(series, "policy_version", policy="young") == 1
    assert value(series, "sim", policy="young") is None
    assert value(series, "last_step_timestamp_seconds", policy="young") is None


def test_a_rule_that_keeps_nothing_of_its_examples_does_not_say_that_none_was_scored(metrics: Metrics) -> None:
    batch = ServiceStatus(policy=policy("batch", keeps_scores=False, scored_examples=0))
    assert value(scraped(metrics, ServerStatus(policies=(batch,))), "scored_ratio", policy="batch") is None


def test_a_stuck_policy_shows_behind_healthy_ones_and_behind_the_cap(metrics: Metrics) -> None:
    healthy = tuple(served(name) for name in "ab")
    stuck = (served("c", lag_s=0.5), served("d", lag_s=40.0, trainers=2), served("e", trainers=1, stepped_at=7.0))
    series = scraped(metrics, ServerStatus(policies=(*healthy, *stuck)))
    assert value(series, "durability_lag_seconds", policy="a") == 0
    assert value(series, "durability_lag_seconds", policy=OTHER) == 40.0
    assert value(series, "trainers", policy=OTHER) == 3
    assert value(series, "table_bytes", policy=OTHER) == 3 * 64
    assert value(series, "last_step_timestamp_seconds", policy=OTHER) == 7.0
    assert value(series, "policy_version", policy=OTHER) is None


def test_a_policy_that_rests_keeps_its_series_and_counts_on_when_it_is_back(metrics: Metrics) -> None:
    metrics.step(policy="a", outcome="applied", rows=5)
    scraped(metrics, ServerStatus(policies=(served("a"),)))
    series = scraped(metrics, ServerStatus(policies=(served("a", in_memory=False),)))
    assert value(series, "policy_version", policy="a") == 1
    assert value(series, "updates_total", policy="a", result="applied") == 1
    assert value(series, "table_bytes", policy="a") == 0
    metrics.step(policy="a", outcome="applied", rows=5)
    series = scraped(metrics, ServerStatus(policies=(served("a"),)))
    assert value(series, "examples_total", policy="a") == 10


def test_policies_in_memory_go_before_those_that_rest(metrics: Metrics) -> None:
    resting = tuple(served(name, in_memory=False) for name in "ab")
    assert value(scraped(metrics, ServerStatus(policies=resting)), "policy_version", policy="b") == 1
    series = scraped(metrics, ServerStatus(policies=(served("c"), *resting)))
    shown = {dict(labels)["policy"] for name, labels in series if name == f"{OWN}policy_version"}
    assert shown == {"c", "a"}
    assert value(series, "updates_total", policy="b", result="applied") is None


def test_the_first_policies_are_shown_and_the_others_counted_together(metrics: Metrics) -> None:
    names = ("a", "b", "c", "d")
    for name in names:
        metrics.step(policy=name, outcome="applied", rows=1)
    series = scraped(metrics, ServerStatus(policies=tuple(served(name) for name in names)))
    shown = {dict(labels)["policy"] for (name, labels) in series if name == "equipoise_server_policy_version"}
    assert shown == {"a", "b"}
    assert value(series, "equipoise_server_updates_total", policy="other", result="applied") == 2
    assert value(series, "equipoise_server_policies") == 4
    assert value(series, "equipoise_server_policies_hidden") == 2


def test_a_vanished_policy_loses_its_series_and_leaves_its_place(metrics: Metrics) -> None:
    for name in ("a", "b", "c"):
        metrics.step(policy=name, outcome="applied", rows=1)
    scraped(metrics, ServerStatus(policies=(served("a"), served("b"), served("c"))))
    series = scraped(metrics, ServerStatus(policies=(served("b"), served("c"))))
    assert value(series, "equipoise_server_updates_total", policy="a", result="applied") is None
    assert value(series, "equipoise_server_policy_version", policy="a") is None
    assert value(series, "equipoise_server_policy_version", policy="c") == 1
    assert value(series, "equipoise_server_policies_hidden") == 0
    assert value(series, "equipoise_server_updates_total", policy="other", result="applied") == 1


def test_steps_of_a_policy_named_other_do_not_vanish_with_it(metrics: Metrics) -> None:
    metrics.step(policy="other", outcome="applied", rows=1)
    series = scraped(metrics, ServerStatus())
    assert value(series, "equipoise_server_updates_total", policy="other", result="applied") == 1


def test_a_policy_loaded_while_the_status_is_taken_is_not_taken_for_gone(metrics: Metrics) -> None:
    def take() -> ServerStatus:
        metrics.step(policy="new", outcome="applied", rows=1)
        return ServerStatus()

    metrics.scrape(take)
    series = series_of(metrics.exposition()[0].decode())
    assert value(series, "equipoise_server_updates_total", policy="new", result="applied") == 1


def of_tenant(policy: str) -> str:
    return policy.partition("-")[0]


def shown_in(series: Series) -> Counter[str]:
    """How many policies of each tenant have metrics of their own."""
    names = (dict(labels)["policy"] for name, labels in series if name == "equipoise_server_policy_version")
    return Counter(map(of_tenant, names))


def test_a_tenant_with_a_thousand_policies_leaves_another_one_its_metrics() -> None:
    metrics = Metrics(build={}, max_policies=10, tenant_of=of_tenant)
    many = tuple(served(f"big-{number}") for number in range(1000))
    for each in many:
        metrics.step(policy=each.policy.name, outcome="applied", rows=1)
    assert shown_in(scraped(metrics, ServerStatus(policies=many))) == {"big": 10}
    status = ServerStatus(policies=(*many, served("small-1")))
    metrics.step(policy="small-1", outcome="applied", rows=1)
    first = scraped(metrics, status)
    assert shown_in(first) == {"big": 9, "small": 1}
    metrics.step(policy="small-1", outcome="applied", rows=1)
    again = scraped(metrics, status)
    assert value(again, "equipoise_server_updates_total", policy="small-1", result="applied") == 1
    counted = {dict(labels)["policy"] for name, labels in again if name == "equipoise_server_updates_total"}
    assert len(counted - {"other"}) == 10
    assert set(first) <= set(again)  # nobody's series come and go without a reason


SIZES = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 12))


def named(sizes: dict[str, int], what: str) -> list[str]:
    return [f"{tenant}-{what}-{number}" for tenant, size in sizes.items() for number in range(size)]


@settings(deadline=None)
@given(SIZES, SIZES, st.integers(0, 20), st.randoms())
def test_places_are_shared_max_min_fair(
    sizes: dict[str, int], resting_sizes: dict[str, int], limit: int, random: Random
) -> None:
    live, resting = named(sizes, "live"), named(resting_sizes, "resting")
    labels = PolicyLabels(limit, tenant_of=of_tenant)
    both = live + resting
    random.shuffle(both)
    for name in both:
        labels.label(name)
    before = labels.shown()
    lost = labels.share(live, resting=resting, known=before)
    assert lost == before - labels.shown()
    have = Counter(of_tenant(name) for name in labels.shown() if name in live)
    assert sum(have.values()) == min(limit, len(live))
    for poor in sizes:
        if have[poor] < sizes[poor]:  # it would like more: nobody has two more than it
            assert max(have.values(), default=0) <= have[poor] + 1
    assert len(labels.shown()) == min(limit, len(both))  # those that rest get what the others leave
    kept = labels.shown()
    assert labels.share(live, resting=resting, known=kept) == frozenset()
    assert labels.shown() == kept


def test_threads_may_count_while_policies_come_and_go(metrics: Metrics) -> None:
    num_threads, num_steps = 4, 2000

    def count() -> None:
        for number in range(num_steps):
            metrics.step(policy=f"p{number % 5}", outcome="applied", rows=1)

    threads = [threading.Thread(target=count) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        scraped(metrics)
    assert value(scraped(metrics), "equipoise_server_batch_examples_count") == num_threads * num_steps


def test_openmetrics_is_given_to_those_who_ask(metrics: Metrics) -> None:
    text, content_type = metrics.exposition("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert text.endswith(b"# EOF\n")


@pytest.mark.parametrize("num_policies", [200, 1000])
def test_a_full_house_is_two_thousand_series_at_most(num_policies: int) -> None:
    """By default, with all that a scrape can show of as many policies and tenants as there may be."""
    metrics = Metrics(
        build={"version": "1"}, max_policies=Settings.model_fields["metrics_max_policies"].default, tenant_of=of_tenant
    )
    status = full_house(num_policies, 2 * MAX_TENANTS)
    for each in status.policies:
        for outcome in RESULTS:
            metrics.step(policy=each.policy.name, outcome=outcome, rows=1)
    series = scraped(metrics, status)
    assert len(series) <= 2000
    assert sum(shown_in(series).values()) == 34


def test_tenants_show_what_they_take_and_what_they_may_take() -> None:
    metrics = Metrics(build={}, max_policies=1, tenant_of=of_tenant)
    red = TenantStatus(name="red", policies=2, table_bytes=10, calls=3, max_calls=9, streams=1, inflight_bytes=5)
    status = ServerStatus(policies=(served("red-1"),), tenants=(red, TenantStatus(name="blue", max_streams=4)))
    first = scraped(metrics, status)
    assert value(first, "tenant_updates_total", tenant="red") == 0
    for name in ("red-1", "red-2", "blue-1"):  # the second has no label of its own
        metrics.step(policy=name, outcome="applied", rows=10)
    series = scraped(metrics, status)
    expected = {
        "tenant_policies": 2, "tenant_table_bytes": 10, "tenant_calls": 3, "tenant_calls_limit": 9, "tenant_streams": 1,
        "tenant_inflight_bytes": 5, "tenant_updates_total": 2, "tenant_examples_total": 20,
    }  # fmt: skip
    assert {name: value(series, name, tenant="red") for name in expected} == expected
    assert value(series, "tenant_streams_limit", tenant="red") is None
    assert value(series, "tenant_streams_limit", tenant="blue") == 4
    gone = scraped(metrics, ServerStatus(tenants=(red,)))
    assert value(gone, "tenant_updates_total", tenant="blue") is None


def test_a_server_without_tenants_has_no_series_of_them(metrics: Metrics) -> None:
    metrics.step(policy="p", outcome="applied", rows=1)
    series = scraped(metrics, ServerStatus(policies=(served("p"),)))
    assert [name for name, _ in series if "tenant" in name] == []


def test_many_tenants_are_told_together_beyond_a_bound() -> None:
    metrics = Metrics(build={}, tenant_of=of_tenant)
    tenants = tuple(TenantStatus(name=f"t{number}", calls=1) for number in range(100))
    for number in range(100):
        metrics.step(policy=f"t{number}-p", outcome="applied", rows=1)
    series = scraped(metrics, ServerStatus(tenants=tenants))
    shown = {dict(labels)["tenant"] for name, labels in series if name == f"{OWN}tenant_calls"}
    assert len(shown) == MAX_TENANTS + 1
    assert value(series, "tenant_calls", tenant=OTHER) == 100 - MAX_TENANTS
    assert value(series, "tenant_updates_total", tenant=OTHER) == 100 - MAX_TENANTS


HOSTILE = ('a"} 1\nequipoise_server_ready 1', "back\\slash", "new\nline", "\u202e\u0000", "{}", "", OTHER)


@pytest.mark.parametrize("accept", ["text/plain", "application/openmetrics-text; version=1.0.0"])
def test_hostile_names_stay_labels(accept: str) -> None:
    """Policies' names are checked before, tenants' names are the operator's: whatever they are, they end no line."""
    metrics = Metrics(build={}, max_policies=10, tenant_of=lambda name: name)
    for name in HOSTILE:
        metrics.step(policy=name, outcome="applied", rows=1)
    status = ServerStatus(
        policies=tuple(map(served, HOSTILE)), tenants=tuple(TenantStatus(name=name, calls=1) for name in HOSTILE)
    )
    metrics.scrape(lambda: status)
    text = metrics.exposition(accept)[0].decode()
    assert [line for line in text.split("\n") if line.startswith(f"{OWN}ready ")] == [f"{OWN}ready 1.0"]
    series = series_of(text.replace("# EOF\n", ""))
    for name in HOSTILE:
        if name != OTHER:
            assert value(series, "policy_version", policy=name) == 1
    assert value(series, "tenant_calls", tenant=HOSTILE[0]) == 1


async def test_the_event_loops_lag_is_measured() -> None:
    heard: list[float] = []
    task = asyncio.create_task(measure_lag(heard.append, interval_s=0.001))
    while len(heard) < 3:
        await asyncio.sleep(0.001)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert min(heard) >= 0
