"""More callers, streams and pings than the server takes: shed and told when to return, and nothing is lost."""

import asyncio
import threading
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from time import monotonic, sleep
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from equipoise import PolicyClient, Source, Timeout, channel
from equipoise.v1 import policy_pb2 as pb
from equipoise.v1 import policy_pb2_grpc
from equipoise_server.app import MAX_PING_STRIKES
from tests.e2e.faults.figures import record, seconds
from tests.e2e.faults.gauges import own_bytes
from tests.e2e.faults.house import House
from tests.e2e.faults.proxy import until
from tests.e2e.faults.training import Training

MIB = 1 << 20
ROWS = 64
COSTLY = {"rule": "projected_gradient", "num_examples": 100_000}
"""A policy whose steps cost the server far more than their callers, the more the more examples it has."""
MAX_STREAMS = 4096
"""The server's default."""
PATIENT = Timeout(step=60.0)
"""Under load on a busy machine a step takes its time, and is to be answered all the same."""


OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]


def a_step() -> pb.UpdateWeightsRequest:
    random = np.random.default_rng(0)
    ids, contributions = random.integers(0, 1000, ROWS).astype("<u8"), random.standard_normal(ROWS).astype("<f4")
    step = pb.StepRequest(example_ids=ids.tobytes(), contributions=contributions.tobytes())
    return pb.UpdateWeightsRequest(policy="p", step=step)


def shed_for(code: grpc.StatusCode, trailing: Iterable[tuple[str, str | bytes]]) -> tuple[str, float]:
    """Why a call was shed, and how many seconds to wait before the next."""
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    status = dict(trailing)["grpc-status-details-bin"]
    assert isinstance(status, bytes)
    reason, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    for detail in status_pb2.Status.FromString(status).details:
        for message in (reason, retry):
            detail.Unpack(message)
    return reason.reason, retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9


def call_until(done: threading.Event, address: str, calls: int) -> Counter[str]:
    """Makes so many calls that are taken, or as many as fit until `done`: how they ended."""
    ended: Counter[str] = Counter()
    request = a_step()
    with grpc.insecure_channel(address, options=OWN_CONNECTION) as connected:
        update = policy_pb2_grpc.PolicyServiceStub(connected).UpdateWeights
        while ended["OK"] < calls and not done.is_set():
            try:
                update(request, timeout=60)
                ended["OK"] += 1
            except grpc.RpcError as error:
                reason, wait_s = shed_for(error.code(), error.trailing_metadata())
                ended[reason] += 1
                sleep(wait_s)
    return ended


def flood(address: str, *, callers: int, calls: int, for_s: float) -> Counter[str]:
    """Calls from many threads at once: how they ended."""
    done = threading.Event()
    timer = threading.Timer(for_s, done.set)
    timer.start()
    with ThreadPoolExecutor(callers) as threads:
        ended = threads.map(lambda _: call_until(done, address, calls), range(callers))
        total = sum(ended, Counter[str]())
    timer.cancel()
    return total


def test_callers_beyond_the_queue_are_shed_and_each_step_counts_once(house: House) -> None:
    server, _ = house.serve(max_queued_steps=1)
    with Training(server.address, timeout=PATIENT, **COSTLY) as training:
        ended = flood(server.address, callers=24, calls=10, for_s=300)
        with grpc.insecure_channel(server.address) as connected:
            health = health_pb2_grpc.HealthStub(connected).Check(health_pb2.HealthCheckRequest(), timeout=30)
    assert ended["OK"] == 240
    assert ended["QUEUE_FULL"] > 0
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    training.assert_kept()
    assert training.stats.fallbacks == 0
    with PolicyClient(server.address, policy="p", timeout=PATIENT) as client:
        assert client.status().version == training.sent + ended["OK"]


@pytest.mark.slow
def test_overload_tenfold(house: House) -> None:
    """Ten times the callers that the queue holds: the rest is shed, and streams and health go on."""
    server, _ = house.serve(max_queued_steps=6)
    with Training(server.address, timeout=PATIENT, **(COSTLY | {"num_examples": 1_000_000})) as training:
        training.wait_until_durable()
        before, calm_from = own_bytes(server.pid), monotonic()
        sleep(2)
        began = monotonic()
        ended = flood(server.address, callers=64, calls=1_000_000, for_s=6.0)
        overloaded, calm, grown = (
            training.since(began),
            training.until(calm_from, began),
            own_bytes(server.pid) - before,
        )
    assert set(ended) == {"OK", "QUEUE_FULL"}
    assert grown < 300 * MIB
    training.assert_kept()
    with PolicyClient(server.address, policy="p", timeout=PATIENT) as client:
        assert client.status().version == training.sent + ended["OK"]
    record(
        "overload: 64 unary callers, steps that cost O(N) for a million examples, a queue of 6",
        promise="bounded queue, shed with RetryInfo; streams and health are answered; memory bounded",
        trainer=f"{overloaded}; without: {calm.longest_step_s:.2f} s; callers: {ended['OK']} steps taken, "
        f"{ended['QUEUE_FULL']} shed; memory +{max(0, grown) / MIB:.0f} MiB",
    )


@pytest.mark.parametrize("limit", [{"max_streams": 2}, {"max_concurrent_rpcs": 2}])
def test_trainers_beyond_the_streams_wait_their_turn_and_lose_nothing(house: House, limit: dict[str, int]) -> None:
    server, _ = house.serve(**limit)
    with PolicyClient(server.address, policy="p", num_examples=4, timeout=PATIENT) as client:
        client.read([0])
    together = threading.Barrier(6)

    def train(number: int) -> int:
        """Steps made; how often it was turned away."""
        with PolicyClient(server.address, policy="p", trainer_id=f"t-{number}", when_lost="wait") as client:
            together.wait(60)
            for _ in range(5):
                assert client.step([number % 4], contributions=[1.0]).source is Source.SERVED
            assert client.flush(30, durable=True)
            assert client.stats.lost == client.stats.dropped == 0
            return client.stats.outages

    with ThreadPoolExecutor(6) as threads:
        assert sum(threads.map(train, range(6))) > 0
    with PolicyClient(server.address, policy="p", when_lost="wait") as client:
        client.read([0])
        assert client.status().version == 30


@pytest.mark.slow
def test_a_client_that_pings_no_faster_than_it_may_stays(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it makes no step: it sends more pings than a client may send that is too fast."""
    server, _ = house.serve(min_ping_interval_s=0.5)
    options = dict(channel.OPTIONS) | {
        "grpc.keepalive_time_ms": 1000,
        "grpc.http2.min_time_between_pings_ms": 1000,
        "grpc.http2.min_sent_ping_interval_without_data_ms": 1000,
    }
    monkeypatch.setattr(channel, "OPTIONS", tuple(options.items()))
    with PolicyClient(server.address, policy="p", num_examples=4, when_lost="wait") as client:
        client.step([0], contributions=[1.0])
        sleep(MAX_PING_STRIKES + 10)
        client.step([0], contributions=[1.0])
        assert client.stats.reconnects == 0


@pytest.mark.slow
def test_a_client_that_pings_too_fast_is_cut_off_and_comes_back(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    options = dict(channel.OPTIONS) | {
        "grpc.keepalive_time_ms": 100,
        "grpc.http2.min_time_between_pings_ms": 100,
        "grpc.http2.min_sent_ping_interval_without_data_ms": 100,
    }
    monkeypatch.setattr(channel, "OPTIONS", tuple(options.items()))
    with PolicyClient(house.server.address, policy="p", num_examples=4, when_lost="wait") as client:
        assert client.step([0], contributions=[1.0]).version == 1
        took = until(lambda: client.stats.reconnects, within_s=120, what="the server cuts it off")
        for version in range(2, 12):
            assert client.step([0], contributions=[1.0]).version == version
        assert client.flush(30, durable=True)
        assert client.stats.lost == client.stats.regressions == 0
        recovered = client.stats.longest_stall
    record(
        "a client that pings ten times a second, not once in 5 s",
        promise="GOAWAY too_many_pings after 30 of them; it reconnects and loses nothing",
        noticed=f"cut off after {seconds(took)}",
        trainer=f"longest step {recovered:.2f} s",
    )


@pytest.mark.slow
def test_five_thousand_idle_streams(house: House) -> None:
    """As many as `max_streams` are open, the others are told to come later, and a trainer is served meanwhile."""
    with Training(house.server.address, timeout=PATIENT) as training:
        training.wait_until_durable()
        before, began = own_bytes(house.server.pid), monotonic()
        opened, refused, grown = asyncio.run(open_many(house, 5000, room=MAX_STREAMS - 1, before=before))
        training.wait_until_served()
        seen = training.since(began)
    assert opened == MAX_STREAMS - 1  # the trainer has one
    assert refused == {("TOO_MANY_STREAMS", 1.0): 5000 - opened}
    training.assert_kept()
    assert grown < opened * 128 * 1024
    record(
        "5000 idle streams, where max_streams is 4096",
        promise="the others are shed with RetryInfo; trainers are served; memory bounded",
        noticed="at their opening",
        trainer=f"{seen}; memory +{grown / MIB:.0f} MiB, {grown / opened / 1024:.0f} KiB a stream",
    )


async def open_many(house: House, count: int, *, room: int, before: int) -> tuple[int, Counter[tuple[str, float]], int]:
    """Opens streams over five connections and holds them: how many opened, why others did not, memory they took."""
    async with AsyncExitStack() as stack:
        channels = [grpc.aio.insecure_channel(house.server.address, options=OWN_CONNECTION) for _ in range(5)]
        stubs = [policy_pb2_grpc.PolicyServiceStub(await stack.enter_async_context(one)) for one in channels]
        refused: Counter[tuple[str, float]] = Counter()
        held = []
        for number in range(count):
            call: Any = stubs[number % 5].Exchange()  # type: ignore[call-arg]  # aio: messages are written
            if len(held) < room:  # else the stream ends by itself, and a failing write would hide why
                await call.write(pb.ExchangeRequest(open=pb.OpenRequest(policy="p", trainer_id=f"idle-{number}")))
            try:
                assert (await call.read()).HasField("opened")
                held.append(call)
            except grpc.aio.AioRpcError as error:
                refused[shed_for(error.code(), error.trailing_metadata())] += 1
        grown = own_bytes(house.server.pid) - before
        for call in held:
            call.cancel()
        return len(held), refused, grown
