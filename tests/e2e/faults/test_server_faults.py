"""What becomes of the server and of the way to it, and that training does not stop for it."""

from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from equipoise import Limits, PolicyClient
from equipoise.v1 import policy_pb2
from tests.e2e.faults.aftermath import assert_all_is_well
from tests.e2e.faults.figures import record, seconds
from tests.e2e.faults.house import House
from tests.e2e.faults.proxy import Way, until
from tests.e2e.faults.training import Training
from tests.patience import PATIENT

LASTS_S = 5.0
"""Most faults: several times what a step waits for its answer (1 s), so that one that waited for the end is seen."""
RECOVERED_WITHIN_S = 30.0
"""Far more than reconnecting takes, and less than gRPC's own pauses grow to."""
NOTICED_WITHIN_S = 15.0
"""A peer that is paused or cut off is noticed by then."""
SERVICE = policy_pb2.DESCRIPTOR.services_by_name["PolicyService"].full_name


def kill(house: House) -> None:
    house.server.kill()


def restart(house: House) -> None:
    house.server.start()


def nothing(house: House) -> None:
    """The fault is over by itself."""


FAULTS: dict[str, tuple[Callable[[House], None], Callable[[House], None], str]] = {
    "server killed (SIGKILL) and restarted": (kill, restart, "reconnects with jittered backoff and replays its window"),
    "server paused (SIGSTOP) for a while": (
        lambda house: house.server.pause(),
        lambda house: house.server.resume(),
        "training goes on after one step's patience",
    ),
    "connections of trainers reset": (lambda house: house.to_server.reset(), nothing, "reconnects and replays"),
    "connection cut in the middle of a message": (
        lambda house: house.to_server.cut_after(1001, Way.DOWN), nothing, "reconnects and replays",
    ),
    "network slow (20 ms each way, 100 kB/s)": (
        lambda house: slow(house, delay_s=0.02, bytes_per_s=1e5),
        lambda house: slow(house, delay_s=0.0, bytes_per_s=None),
        "training is slower, nothing else",
    ),
}  # fmt: skip


def slow(house: House, *, delay_s: float, bytes_per_s: float | None) -> None:
    house.to_server.delay_s, house.to_server.bytes_per_s = delay_s, bytes_per_s


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_training_goes_on_without_the_server(house: House, tmp_path: Path, fault: str) -> None:
    begin, end, promise = FAULTS[fault]
    with Training(house.address) as training:
        training.wait_until_durable()
        began = monotonic()
        begin(house)
        sleep(LASTS_S)
        end(house)
        recovered = training.wait_until_served(within_s=RECOVERED_WITHIN_S)
        seen = training.since(began)
    assert seen.longest_step_s < LASTS_S
    assert_all_is_well(training, house.address, tmp_path)
    record(
        fault,
        promise=promise,
        noticed=seconds(seen.noticed_s),
        recovered=seconds(recovered),
        trainer=str(seen),
    )


@pytest.mark.slow
def test_a_half_open_connection_is_noticed_and_left(house: House, tmp_path: Path) -> None:
    """The way there goes dark for the connections there are; new ones find the server."""
    with Training(house.address) as training:
        training.wait_until_durable()
        began = monotonic()
        house.to_server.strand()
        until(
            lambda: training.failure or training.stats.reconnects, within_s=4 * NOTICED_WITHIN_S, what="it reconnects"
        )
        reconnected = monotonic() - began
        training.wait_until_served()
        seen = training.since(began)
    assert seen.longest_step_s < reconnected
    assert_all_is_well(training, house.address, tmp_path)
    record(
        "half-open connection (black hole)",
        promise=f"noticed within {NOTICED_WITHIN_S:g} s; training goes on after one step's patience",
        noticed=seconds(seen.noticed_s),
        recovered=seconds(reconnected),
        trainer=str(seen),
    )


def test_beyond_its_window_a_trainer_drops_new_statistics_and_nothing_else(house: House) -> None:
    with Training(house.address, limits=Limits(window_steps=256)) as training:
        training.wait_until_durable()
        house.server.pause()
        until(lambda: training.failure or training.stats.dropped > 100, what="the window is full")
        house.server.resume()
        training.wait_until_durable()
    training.assert_kept(room=False)
    with PolicyClient(house.address, policy="p", timeout=PATIENT) as client:
        assert client.status().version == training.sent < training.stats.steps


@pytest.mark.slow
def test_an_idle_connection_stays(house: House) -> None:
    """The client's pings are no more than the server permits."""
    with PolicyClient(house.address, policy="p", num_examples=4, when_lost="wait") as client:
        client.step([0], contributions=[1.0])
        sleep(40)
        client.step([0], contributions=[1.0])
        assert client.stats.reconnects == client.stats.outages == 0
    record(
        "idle stream for 40 s",
        promise="keepalive every 8 s is permitted: no GOAWAY",
        noticed="nothing to notice",
        recovered="",
        trainer="no reconnect",
    )


def test_sigterm_under_load(house: House, tmp_path: Path) -> None:
    """NOT_SERVING first, while steps are served; then streams are asked to leave; then the end, in order."""
    server, before = house.serve(drain_delay_s=2.0)
    with (
        grpc.insecure_channel(server.address) as channel,
        Training(before.address, when_lost="wait") as training,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        until(lambda: health.Check(request, timeout=60).status == health_pb2.HealthCheckResponse.SERVING, what="ready")
        told = monotonic()
        server.terminate()
        until(lambda: health.Check(request, timeout=60).status != health_pb2.HealthCheckResponse.SERVING, what="told")
        not_serving = monotonic() - told
        training.wait_until_served()  # it goes on until balancers have noticed; afterwards nobody would answer
        assert server.join() == 0
        ended = monotonic() - told
        server.start()
        recovered = training.wait_until_served()
        seen = training.since(told)
    assert ended < 20.0  # the grace period
    assert seen.unserved == 0
    assert_all_is_well(training, before.address, tmp_path)
    record(
        "server stopped (SIGTERM) under load, started again",
        promise="NOT_SERVING first, streams asked in-band to leave, exit 0 within 20 s, no step lost, no error",
        noticed=f"NOT_SERVING after {seconds(not_serving)}",
        recovered=f"ended after {seconds(ended)} (2 s of it drain delay); {seconds(recovered)} after the new start",
        trainer=str(seen),
    )


def test_an_idle_policy_leaves_memory_and_comes_back_on_first_touch(house: House) -> None:
    server, _ = house.serve(policy_idle_s=0.3)
    with PolicyClient(server.address, policy="idle", num_examples=4, when_lost="wait") as client:
        epoch = client.step([0, 1], contributions=[1.0, -1.0]).epoch
        weights = client.read_weights()
    with PolicyClient(server.address, policy="idle", when_lost="wait") as client:
        until(lambda: client.status().epoch > epoch or sleep(0.5), what="it left memory, and came back for the status")
        np.testing.assert_array_equal(client.read_weights(), weights)
        assert client.step([0, 1], contributions=[1.0, -1.0]).version == 2
