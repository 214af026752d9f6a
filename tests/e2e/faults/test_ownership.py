"""Two servers on one Redis: the policy is one server's, and moves with its trainers when that one dies or stops."""

import asyncio
import itertools
from collections.abc import Iterable
from pathlib import Path
from time import monotonic

import numpy as np
import pytest

from equipoise import PolicyAdmin, PolicyClient, Source
from equipoise.errors import OwnershipError, UnavailableError
from equipoise_server.app import Server
from equipoise_server.settings import Settings
from equipoise_server.store.keys import heartbeat_key
from tests.e2e.faults.figures import record, seconds
from tests.e2e.faults.house import House
from tests.e2e.faults.proxy import FaultProxy, until
from tests.e2e.faults.redis_server import running
from tests.e2e.faults.training import Training
from tests.e2e.faults.zygote import ForkedServer
from tests.patience import PATIENT

OWNER_TIMEOUT_S = 5.0
"""The server's default."""
MOVED_WITHIN_S = 90.0
"""Far more than the move takes: a busy machine may take its time."""


@pytest.fixture
def second(house: House) -> tuple[ForkedServer, FaultProxy]:
    return house.serve()


async def test_a_server_is_known_to_the_others_before_it_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that took a policy before its first heartbeat would count as gone, and lose the policy again."""
    ready = tmp_path / "ready.json"
    with running(tmp_path) as redis:
        patient = {"redis_timeout_s": MOVED_WITHIN_S, "owner_timeout_s": MOVED_WITHIN_S}
        settings = Settings(
            redis_url=redis.url, listen="127.0.0.1:0", metrics_listen="", device="cpu", ready_file=ready, **patient
        )
        server = Server(settings)
        monkeypatch.setattr(server, "_watch_redis", asyncio.Event().wait)  # no heartbeat after the first
        stop = asyncio.Event()
        serving = asyncio.create_task(server.run(stop))
        async with asyncio.timeout(MOVED_WITHIN_S):
            while not ready.exists():
                await asyncio.sleep(0.01)
        known = redis.client().exists(heartbeat_key("equipoise", server._instance))
        stop.set()
        await serving
    assert known


def epoch_at(training: Training) -> int:
    return training.made[-1].result.epoch


def test_trainers_are_led_to_the_owner_by_whomever_they_ask(
    house: House, second: tuple[ForkedServer, FaultProxy], tmp_path: Path
) -> None:
    with PolicyClient(house.address, policy="p", num_examples=4, when_lost="wait") as client:
        client.step([0, 1], contributions=[1.0, -1.0])
        with PolicyClient(second[1].address, policy="p", when_lost="wait") as other:
            result = other.step([0, 1], contributions=[1.0, -1.0])
            assert (result.epoch, result.version) == (1, 2)
            np.testing.assert_array_equal(other.read_weights(), client.read_weights())
            assert other.status().version == 2
            assert other.admin.export_policy("p", tmp_path / "p.npz") == 2
        with pytest.raises(OwnershipError, match=house.address):
            raw_status(second[1].address)


def raw_status(address: str) -> None:
    """Asks one server alone."""
    admin = PolicyAdmin(address)
    admin._route.repeats = lambda error, **_: False  # type: ignore[method-assign,assignment]
    with admin:
        admin.get("p")


class Balancer(FaultProxy):
    """One address of several servers, as a Service of Kubernetes: each connection leads to the next of the list."""

    def __init__(self, targets: Iterable[tuple[str, int]]) -> None:
        self._targets = iter(targets)
        self.connected = 0
        super().__init__(("127.0.0.1", 1))

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        self.target = next(self._targets)
        self.connected += 1
        return await super()._connect()


@pytest.mark.slow
@pytest.mark.parametrize("hangs", [True, False])
def test_an_owner_address_that_leads_nowhere_is_no_worse_than_asking_again(
    house: House, caplog: pytest.LogCaptureFixture, hangs: bool
) -> None:
    """The owner tells an address that nobody can use; the address that the trainer has leads there in the end."""
    with Balancer(itertools.repeat(("127.0.0.1", 1))) as nowhere:
        if hangs:
            nowhere.hold()
        # A busy machine that holds its heartbeat up must not make the other server the owner.
        owner, _ = house.serve(advertise=nowhere.address, owner_timeout_s=10 * MOVED_WITHIN_S)
        with PolicyClient(owner.address, policy="p", num_examples=4, when_lost="wait") as client:
            client.step([0, 1], contributions=[1.0, -1.0])
        wrong, right = (int(server.address.rpartition(":")[2]) for server in (house.server, owner))
        ports = itertools.chain([wrong] * 6, itertools.repeat(right))
        with (
            Balancer(("127.0.0.1", port) for port in ports) as service,
            PolicyClient(service.address, policy="p", num_examples=4) as trainer,
        ):
            until(
                lambda: trainer.step([0, 1], contributions=[1.0, -1.0]).source is Source.SERVED,
                within_s=MOVED_WITHIN_S,
                what=lambda: f"weights are served; {service.connected} connections, {nowhere.connected} to nowhere",
            )
            assert service.connected >= 7
            if hangs:  # where it is refused at once, gRPC tries again by itself
                assert nowhere.connected <= 4, "the client follows again and again"
        warnings = [record.getMessage() for record in caplog.records if "cannot be reached" in record.getMessage()]
        assert len(warnings) == 1
        assert nowhere.address in warnings[0]


@pytest.mark.slow
def test_the_policy_moves_when_its_server_dies(house: House, second: tuple[ForkedServer, FaultProxy]) -> None:
    with Training(f"{house.address},{second[1].address}") as training:
        died = monotonic()
        house.server.kill()
        until(lambda: training.failure or epoch_at(training) > 1, within_s=MOVED_WITHIN_S, what="the other answers")
        moved = monotonic() - died
        seen = training.since(died)
    training.assert_kept()
    assert training.closed_in_s < 20
    record(
        "two servers: the owner is killed",
        promise=f"the policy moves once its owner was silent for {OWNER_TIMEOUT_S:g} s",
        noticed=seconds(seen.noticed_s),
        recovered=seconds(moved),
        trainer=str(seen),
    )


def test_the_policy_moves_when_its_server_stops(house: House) -> None:
    """At once: its heartbeat in Redis would not run out before this test."""
    (first, before), (_, other) = (house.serve(owner_timeout_s=10 * MOVED_WITHIN_S) for _ in range(2))
    with Training(f"{before.address},{other.address}") as training:
        stopped = monotonic()
        first.terminate()
        until(lambda: training.failure or epoch_at(training) > 1, within_s=MOVED_WITHIN_S, what="the other answers")
        moved = monotonic() - stopped
        seen = training.since(stopped)
        assert first.join() == 0
    training.assert_kept()
    record(
        "two servers: the owner stops (SIGTERM)",
        promise="it hands its policies over once their streams have left",
        noticed="at once (in-band)",
        recovered=seconds(moved),
        trainer=str(seen),
    )


@pytest.mark.slow
def test_a_paused_owner_that_wakes_up_cannot_write_and_its_trainers_move_on(
    house: House, second: tuple[ForkedServer, FaultProxy]
) -> None:
    with (
        Training(f"{house.address},{second[1].address}", trainer_id="moves") as training,
        # This one knows the paused server alone: it waits for it, and is led on when it wakes up.
        Training(house.address, trainer_id="stays") as faithful,
    ):
        paused = monotonic()
        house.server.pause()
        until(lambda: training.failure or epoch_at(training) > 1, within_s=MOVED_WITHIN_S, what="the other answers")
        moved = monotonic() - paused
        seen = training.since(paused)
        assert epoch_at(faithful) == 1
        woken = monotonic()
        house.server.resume()
        until(lambda: faithful.failure or faithful.served_since(woken), within_s=60, what="led to the new owner")
        led = monotonic() - woken
        assert epoch_at(faithful) > 1
    for each in (training, faithful):
        each.assert_kept()
    with PolicyClient(second[1].address, policy="p", timeout=PATIENT) as client:
        # Every step of both is there exactly once.
        assert client.status().version == training.sent + faithful.sent
    assert "another server owns the policy now" in house.server.log
    record(
        "two servers: the owner is paused (SIGSTOP), then wakes up",
        promise="its writes are fenced; noticed within 15 s; its trainers move on",
        noticed=seconds(seen.noticed_s),
        recovered=f"{seconds(moved)}; trainers left behind {seconds(led)} after it woke up",
        trainer=str(seen),
    )


@pytest.mark.slow
def test_an_idle_policy_is_taken_from_a_server_cut_off_from_redis(house: House) -> None:
    """It cannot know; its trainers do, and it learns at their next opening."""
    apart = house.proxy(house.redis.port)
    second, to_second = house.serve(to_redis=apart)
    with PolicyClient(house.address, policy="p", num_examples=4, when_lost="wait") as client:
        client.step([0, 1], contributions=[1.0, -1.0])
    until(lambda: house.address in present(house), what="the first server's heartbeat")
    house.to_redis.hold()
    until(lambda: house.address not in present(house), what="the first server counts as gone")
    with PolicyClient(to_second.address, policy="p", when_lost="wait") as client:
        assert client.step([0, 1], contributions=[1.0, -1.0]).epoch == 2
        house.to_redis.release()
        house.to_redis.reset()
        until(lambda: is_not_owner(house.address), what="the first server knows that it lost the policy")
        assert client.step([0, 1], contributions=[1.0, -1.0]).version == 3
    assert second.log.count("another server owns") == 0


def present(house: House) -> set[str]:
    """The addresses of the servers whose heartbeats Redis holds."""
    with house.redis.client() as redis:
        said = [redis.get(key) for key in redis.keys("*:server:*")]
    return {beat.decode().partition(" ")[0] for beat in said if beat is not None}


def is_not_owner(address: str) -> bool:
    try:
        raw_status(address)
    except OwnershipError:
        return True
    except UnavailableError:
        return False
    return False
