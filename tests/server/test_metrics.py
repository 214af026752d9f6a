"""Metrics: the promised names, every RPC from 0, one gauge per policy while it lives, and a capped number of them."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Sequence

import pytest
from prometheus_client.parser import text_string_to_metric_families

from equipoise_server.engine import PolicyStatus
from equipoise_server.engine.progress import Progress
from equipoise_server.metrics import Endpoint, Metrics, ServerStatus, measure_lag

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]

EXCHANGE = "/equipoise.v1.PolicyService/Exchange"


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
    return series.get((name, tuple(sorted(labels.items()))))


def facts(name: str, version: int = 1) -> PolicyStatus:
    return PolicyStatus(
        name=name,
        num_examples=8,
        reference_nats=None,
        progress=Progress(version=version),
        scored_examples=2,
        effective_examples=4.0,
        guard_strength=0.0,
        table_bytes=0,
    )


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(build={"version": "1.2.3"}, max_policies=2, clock=lambda: 1234.5)


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
    metrics.rejected(reason="NON_FINITE_STAT")
    metrics.fenced()
    metrics.persisted()
    metrics.event_loop_lag(0.002)
    metrics.store.command("append", 0.0005)
    metrics.store.error("timeout")
    metrics.store.syncs(failing=True)
    status = ServerStatus(
        policies=(facts("p"),),
        queued_steps=4,
        inflight_bytes=5,
        active_streams=6,
        trainers=7,
        unpersisted_updates=8,
        redis_up=True,
        draining=True,
    )
    series, own = scraped(metrics, status), "equipoise_server_"
    assert value(series, f"{own}updates_total", policy="p", result="applied") == 1
    assert value(series, f"{own}examples_total", policy="p", result="applied") == 64
    assert value(series, f"{own}batch_examples_sum") == 64
    assert value(series, f"{own}batch_steps_sum") == 3
    assert value(series, f"{own}message_duration_seconds_sum", method="Exchange", stage="compute") == 0.001
    assert value(series, f"{own}rejected_values_total", reason="NON_FINITE_STAT") == 1
    assert value(series, f"{own}fenced_writes_total") == 1
    assert value(series, f"{own}last_persist_timestamp_seconds") == 1234.5
    assert value(series, f"{own}event_loop_lag_seconds_sum") == 0.002
    assert value(series, f"{own}redis_command_duration_seconds_sum", command="append") == 0.0005
    assert value(series, f"{own}redis_errors_total", kind="timeout") == 1
    assert value(series, f"{own}redis_sync_failing") == 1
    assert value(series, f"{own}queue_depth") == 4
    assert value(series, f"{own}inflight_bytes") == 5
    assert value(series, f"{own}active_streams") == 6
    assert value(series, f"{own}clients") == 7
    assert value(series, f"{own}unpersisted_updates") == 8
    assert value(series, f"{own}redis_up") == 1
    assert value(series, f"{own}draining") == 1
    assert value(series, f"{own}build_info", version="1.2.3") == 1
    assert value(series, "process_resident_memory_bytes")


def test_a_policy_shows_what_it_knows_and_only_that(metrics: Metrics) -> None:
    young = facts("young")
    grown = PolicyStatus(
        name="grown",
        num_examples=8,
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
        effective_examples=4.0,
        guard_strength=0.125,
        table_bytes=0,
    )
    series = scraped(metrics, ServerStatus(policies=(young, grown)))
    expected = {
        "policy_version": 9,
        "weight_effective_examples_ratio": 0.5,
        "weight_max": 4.0,
        "sim": 2.0,
        "positive_share": 0.625,
        "target_loss": 1.5,
        "guard_loss": 1.75,
        "guard_strength": 0.125,
        "compression_ratio": 3.0,
        "scored_ratio": 0.75,
    }
    assert {name: value(series, f"equipoise_server_{name}", policy="grown") for name in expected} == expected
    assert value(series, "equipoise_server_policy_version", policy="young") == 1
    assert value(series, "equipoise_server_sim", policy="young") is None


def test_the_first_policies_are_shown_and_the_others_counted_together(metrics: Metrics) -> None:
    names = ("a", "b", "c", "d")
    for name in names:
        metrics.step(policy=name, outcome="applied", rows=1)
    series = scraped(metrics, ServerStatus(policies=tuple(facts(name) for name in names)))
    shown = {dict(labels)["policy"] for (name, labels) in series if name == "equipoise_server_policy_version"}
    assert shown == {"a", "b"}
    assert value(series, "equipoise_server_updates_total", policy="other", result="applied") == 2
    assert value(series, "equipoise_server_policies") == 4
    assert value(series, "equipoise_server_policies_hidden") == 2


def test_a_vanished_policy_loses_its_series_and_leaves_its_place(metrics: Metrics) -> None:
    for name in ("a", "b", "c"):
        metrics.step(policy=name, outcome="applied", rows=1)
    scraped(metrics, ServerStatus(policies=(facts("a"), facts("b"), facts("c"))))
    series = scraped(metrics, ServerStatus(policies=(facts("b"), facts("c"))))
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


def test_a_full_house_stays_small() -> None:
    metrics = Metrics(build={}, max_policies=100)
    names = [f"policy-{number}" for number in range(1000)]
    for name in names:
        for outcome in ("applied", "duplicate", "refused", "read"):
            metrics.step(policy=name, outcome=outcome, rows=1)
    assert len(scraped(metrics, ServerStatus(policies=tuple(map(facts, names))))) < 3000


async def test_the_event_loops_lag_is_measured() -> None:
    heard: list[float] = []
    task = asyncio.create_task(measure_lag(heard.append, interval_s=0.001))
    while len(heard) < 3:
        await asyncio.sleep(0.001)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert min(heard) >= 0


@contextlib.asynccontextmanager
async def serving(
    metrics: Metrics,
    *,
    status: Callable[[], ServerStatus] = ServerStatus,
    problems: Callable[[], Sequence[str]] = tuple,
) -> AsyncIterator[str]:
    endpoint = Endpoint(metrics, status=status, problems=problems)
    address = await endpoint.start("127.0.0.1:0")
    try:
        yield address
    finally:
        await endpoint.stop()


async def sent(address: str, request: bytes) -> tuple[int, str, str]:
    """Status, head and body of the answer to raw bytes."""
    host, port = address.rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request)
    writer.write_eof()
    answer = (await asyncio.wait_for(reader.read(), 10)).decode()
    writer.close()
    await writer.wait_closed()
    head, _, body = answer.partition("\r\n\r\n")
    return int(head.split(" ")[1]), head, body


async def got(address: str, path: str) -> tuple[int, str, str]:
    return await sent(address, f"GET {path} HTTP/1.1\r\nHost: x\r\nAccept: text/plain\r\n\r\n".encode())


async def test_metrics_are_served_as_of_now(metrics: Metrics) -> None:
    versions = iter((1, 2))
    async with serving(metrics, status=lambda: ServerStatus(policies=(facts("p", next(versions)),))) as address:
        for version in (1, 2):
            status, head, body = await got(address, "/metrics")
            assert status == 200
            assert "text/plain; version=" in head
            assert value(series_of(body), "equipoise_server_policy_version", policy="p") == version


async def test_health_is_served_with_its_reasons(metrics: Metrics) -> None:
    problems = ["redis has not been reached yet"]
    async with serving(metrics, problems=lambda: problems) as address:
        status, _, body = await got(address, "/healthz")
        assert (status, body) == (503, "redis has not been reached yet\n")
        problems.clear()
        status, _, body = await got(address, "/healthz")
        assert (status, body) == (200, "ok\n")


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"POST /metrics HTTP/1.1\r\n\r\n", 405),
        (b"nonsense\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", 400),
    ],
)
async def test_whatever_is_sent_is_answered(metrics: Metrics, request_bytes: bytes, status: int) -> None:
    async with serving(metrics) as address:
        assert (await sent(address, request_bytes))[0] == status
        assert (await got(address, "/healthz"))[0] == 200


async def test_a_status_that_fails_is_an_answer_too(metrics: Metrics) -> None:
    def fail() -> ServerStatus:
        raise RuntimeError("secret")

    async with serving(metrics, status=fail) as address:
        status, _, body = await got(address, "/metrics")
    assert status == 500
    assert "secret" not in body


async def test_a_second_endpoint_on_the_address_fails(metrics: Metrics) -> None:
    async with serving(metrics) as address:
        with pytest.raises(OSError, match="in use"):
            await Endpoint(metrics, status=ServerStatus, problems=tuple).start(address)
