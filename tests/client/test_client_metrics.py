"""What clients see, shown by the real Prometheus and OpenTelemetry libraries: the same names, and the same numbers."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from time import monotonic
from typing import Any

import numpy as np
import pytest
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from equipoise import Limits, PolicyClient, Timeout, aio
from equipoise.metrics.clients import COUNTERS, GAUGES
from equipoise.metrics.opentelemetry import OpenTelemetryMetrics
from equipoise.metrics.prometheus import PrometheusMetrics
from equipoise.options import ClientMetrics
from tests.deploy.prometheus import until
from tests.patience import PATIENT
from tests.ports import free_port
from tests.servers import ServerProcess, serve

PREFIX = "equipoise_client_"
Scrape = Callable[[], dict[str, float]]


@contextmanager
def by_prometheus() -> Iterator[tuple[ClientMetrics, Scrape]]:
    registry = CollectorRegistry()
    yield PrometheusMetrics(registry), lambda: scraped(registry)


@contextmanager
def by_opentelemetry() -> Iterator[tuple[ClientMetrics, Scrape]]:
    provider = MeterProvider([PrometheusMetricReader()])  # in the process's common registry
    yield OpenTelemetryMetrics(provider.get_meter("equipoise")), lambda: scraped(REGISTRY)
    provider.shutdown()


@pytest.fixture(params=[by_prometheus, by_opentelemetry])
def shown(request: pytest.FixtureRequest) -> Iterator[tuple[ClientMetrics, Scrape]]:
    """Metrics for clients, and what a scrape gives: values of policy `p` by name, without the prefix."""
    with request.param() as metrics:
        yield metrics


@pytest.fixture
def server() -> Iterator[ServerProcess]:
    with serve() as process:
        yield process


def scraped(registry: CollectorRegistry) -> dict[str, float]:
    return {
        sample.name.removeprefix(PREFIX): sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
        if sample.labels.get("policy") == "p" and "le" not in sample.labels
    }


def client_of(address: str, metrics: ClientMetrics, **options: Any) -> PolicyClient:
    given = {"timeout": PATIENT} | options
    return PolicyClient(address, policy="p", num_examples=8, rule="ema_sign", metrics=metrics, **given)


def stepped(client: PolicyClient, steps: int) -> None:
    for _ in range(steps):
        client.step(np.arange(8), contributions=np.arange(8) - 2.0)


def test_both_show_the_same_names(shown: tuple[ClientMetrics, Scrape], server: ServerProcess) -> None:
    metrics, scrape = shown
    with client_of(server.address, metrics) as client:
        stepped(client, 1)
        names = set(scrape())
    assert names - {"round_trip_seconds_created"} == {
        *(f"{counter.name}_total" for counter in COUNTERS),
        *(gauge.name for gauge in GAUGES),
        "round_trip_seconds_count",
        "round_trip_seconds_sum",
    }


def test_a_served_client(shown: tuple[ClientMetrics, Scrape], server: ServerProcess) -> None:
    metrics, scrape = shown
    began = monotonic()
    with client_of(server.address, metrics, max_staleness=77, limits=Limits(window_steps=9)) as client:
        stepped(client, 3)
        assert client.flush(durable=True)
        seen = scrape()
        assert {name: seen[name] for name in ("steps_total", "fallbacks_total", "clients", "connected")} == {
            "steps_total": 3, "fallbacks_total": 0, "clients": 1, "connected": 1,
        }  # fmt: skip
        assert (seen["staleness_steps"], seen["max_staleness_steps"]) == (0, 77)
        assert (seen["unacked_steps"], seen["window_steps"], seen["window_steps_limit"]) == (0, 0, 9)
        assert seen["round_trip_seconds_count"] >= 3  # and what flush reads
        assert 0 < seen["round_trip_seconds_sum"] <= monotonic() - began
    seen = scrape()
    assert seen["steps_total"] == 3  # its counts stay
    assert "connected" not in seen


def test_a_client_whose_server_is_lost(shown: tuple[ClientMetrics, Scrape], server: ServerProcess) -> None:
    metrics, scrape = shown
    with client_of(
        server.address, metrics, timeout=replace(PATIENT, close=0.1), limits=Limits(window_steps=4)
    ) as client:
        stepped(client, 2)
        assert client.flush(durable=True)
        server.kill()
        stepped(client, 6)
        seen = scrape()
        assert (seen["connected"], seen["outages_total"]) == (0, 1)
        assert seen["fallbacks_total"] == 6
        assert seen["staleness_steps"] == 6
        assert (seen["window_steps"], seen["unacked_steps"], seen["dropped_steps_total"]) == (4, 4, 2)
        server.start()
        until(lambda: scrape()["connected"], "the client is back")
        assert client.flush(durable=True)
        seen = scrape()
        assert (seen["reconnects_total"], seen["window_steps"]) == (1, 0)
        assert seen["staleness_steps"] <= 2  # the two steps that were dropped have no answer


def test_clients_of_one_policy_are_told_together(shown: tuple[ClientMetrics, Scrape], server: ServerProcess) -> None:
    metrics, scrape = shown
    with (
        client_of(server.address, metrics) as first,
        client_of(f"127.0.0.1:{free_port()}", metrics, timeout=Timeout(step=0.01, connect=0.01, close=0.01)) as lost,
    ):
        stepped(first, 2)
        stepped(lost, 5)
        seen = scrape()
        assert (seen["clients"], seen["connected"], seen["steps_total"]) == (2, 1, 7)
        assert seen["staleness_steps"] == 5  # the worst
        with first.for_policy("p") as third:
            assert scrape()["clients"] == 3
            del third
    assert scrape()["steps_total"] == 7


def test_a_client_that_was_never_closed_counts_on(shown: tuple[ClientMetrics, Scrape]) -> None:
    metrics, scrape = shown
    client = client_of(f"127.0.0.1:{free_port()}", metrics, timeout=Timeout(step=0.01, connect=0.01, close=0.01))
    assert scrape()["clients"] == 1
    del client
    gc.collect()
    seen = scrape()
    assert "clients" not in seen
    assert seen["steps_total"] == 0


async def test_the_client_for_asyncio_is_shown_alike(
    shown: tuple[ClientMetrics, Scrape], server: ServerProcess
) -> None:
    metrics, scrape = shown
    async with aio.PolicyClient(server.address, policy="p", num_examples=8, metrics=metrics, timeout=PATIENT) as client:
        await client.step(np.arange(8), contributions=np.arange(8) - 2.0)
        seen = scrape()
        assert (seen["steps_total"], seen["connected"], seen["round_trip_seconds_count"]) == (1, 1, 1)
    assert "clients" not in scrape()


def test_nothing_is_shown_unless_it_is_asked_for(server: ServerProcess) -> None:
    before = set(scraped(REGISTRY))
    with PolicyClient(server.address, policy="p", num_examples=8) as client:
        stepped(client, 1)
        assert set(scraped(REGISTRY)) == before


def test_a_forked_child_begins_with_no_clients(server: ServerProcess) -> None:
    with by_prometheus() as (metrics, scrape):
        client = client_of(server.address, metrics)  # not connected: the child may be forked
        child = os.fork()
        if not child:
            os._exit(0 if scrape().get("clients", 0) == 0 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert scrape()["clients"] == 1
        client.close()
