"""A long log after a kill: callers are told to wait and come back, trainers are answered again, and nothing is lost."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from time import monotonic, sleep

import pytest

from equipoise import PolicyAdmin, PolicyClient, PolicySpec, Source
from equipoise.errors import UnavailableError
from tests.e2e.faults.figures import record, seconds
from tests.e2e.faults.flow import Flow, steps_of
from tests.e2e.faults.house import House
from tests.e2e.faults.proxy import At, until
from tests.patience import PATIENT

NUM_EXAMPLES = 1_000_000
STEPS, ROWS = 30_000, 64
BACK_WITHIN_S = 60.0


def create(address: str) -> None:
    with PolicyAdmin(address) as admin:
        admin.create(PolicySpec(name="p", num_examples=NUM_EXAMPLES, durability="behind"))


def train(address: str, steps: int) -> None:
    """Makes so many steps and waits until they are durable."""
    with Flow(address, steps_of(ROWS, high=NUM_EXAMPLES), in_flight=256) as flow, PolicyAdmin(address) as admin:
        flow.make(steps, within_s=300)
        until(lambda: admin.get("p").durable_version == steps, within_s=120, what="every step is durable")


def ask(admin: PolicyAdmin) -> tuple[int | None, UnavailableError | None]:
    """The version, or why there is no answer yet."""
    try:
        return admin.get("p").version, None
    except UnavailableError as error:
        return None, error


def ask_until_answered(address: str) -> tuple[Counter[str], float]:
    """What an operator does: asks, and again after the time that he is told. Why he waited, and how long, seconds."""
    began = monotonic()
    waits: Counter[str] = Counter()
    with PolicyAdmin(address) as admin:
        while True:
            version, why_not = ask(admin)
            if version is not None:
                return waits, monotonic() - began
            assert why_not is not None
            waits[why_not.reason or str(why_not)] += 1
            assert why_not.retry_after is not None, why_not
            assert monotonic() < began + BACK_WITHIN_S, waits
            sleep(why_not.retry_after)


@pytest.mark.slow
def test_a_policy_with_a_long_log_comes_back_after_a_kill(house: House) -> None:
    """A trainer with default settings trains on and is served again; who asks is told to wait and then answered."""
    server = house.server
    create(server.address)
    train(server.address, STEPS)
    with PolicyClient(server.address, policy="p", timeout=PATIENT) as client, ThreadPoolExecutor(1) as thread:
        assert client.step([0, 1], contributions=[1.0, -1.0]).source is Source.SERVED
        assert client.flush(durable=True)
        server.kill()
        server.start()
        began = monotonic()
        operator = thread.submit(ask_until_answered, server.address)

        def is_served() -> bool:
            sleep(0.02)
            return client.step([0, 1], contributions=[1.0, -1.0]).source is Source.SERVED

        until(is_served, within_s=BACK_WITHIN_S, what=lambda: f"a step is served; {client.stats}")
        back_s = monotonic() - began
        waits, asked_s = operator.result(2 * BACK_WITHIN_S)
        assert set(waits) <= {"LOADING"}
        assert client.flush(BACK_WITHIN_S, durable=True)
        stats = client.stats
        assert (stats.lost, stats.regressions, stats.dropped, stats.forgotten) == (0, 0, 0, 0)
        assert client.status().version == STEPS + stats.steps
    record(
        f"server killed, {STEPS} steps of {ROWS} rows in the log since the last sweep",
        promise="training goes on, nothing is lost; who asks is told LOADING and when to return",
        recovered=f"{seconds(back_s)}; status after {seconds(asked_s)}, told to wait {sum(waits.values())} times",
        trainer=f"{stats.fallbacks} steps on older weights, longest step {stats.longest_stall:.2f} s",
    )


def test_who_asks_while_a_policy_is_loading_is_told_so_and_when_to_return(house: House) -> None:
    server, _ = house.serve(redis_timeout_s=60.0)
    create(server.address)
    train(server.address, 100)
    server.kill()
    with house.to_redis.trap(b"XRANGE", At.REPLY) as trap, PolicyAdmin(server.address, timeout=10) as admin:
        admin._route.repeats = lambda error, **_: False  # type: ignore[method-assign,assignment]  # each waits for 9 s
        server.start()
        version, why_not = ask(admin)
        assert trap.caught.is_set()
        assert version is None
        assert why_not is not None
        assert why_not.reason == "LOADING", why_not
        assert why_not.retry_after
        house.to_redis.free(trap)
        until(lambda: ask(admin)[0] == 100, within_s=BACK_WITHIN_S, what=lambda: f"the policy is back; {ask(admin)}")
