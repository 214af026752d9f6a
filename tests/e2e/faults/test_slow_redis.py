"""A Redis far away, or one that stood still: the memory of the server is bounded, and LOGGED means logged again."""

from contextlib import ExitStack
from time import monotonic, sleep

import pytest

from equipoise import PolicyAdmin, PolicySpec
from equipoise.policies import Durability
from tests.e2e.faults.figures import record, seconds
from tests.e2e.faults.flow import Flow, steps_of
from tests.e2e.faults.gauges import MIB, gauges, own_bytes
from tests.e2e.faults.house import House
from tests.e2e.faults.proxy import until
from tests.e2e.faults.zygote import ForkedServer

NUM_EXAMPLES = 100_000
ROWS = 8192
FAR_S = 0.010
"""One way: a Redis 20 ms away."""
SWEEP_MIN_BYTES = MIB
"""The log in memory is bounded by four times this."""
MAX_UNPERSISTED = 200
"""Steps of 8192 rows take 96 KiB: about 43 fill the bound, and one device call adds 64 at most."""
MAX_GROWTH_BYTES = 96 * MIB
STALL_S = 0.6
AGAIN_WITHIN_S = 30.0
"""3 s are promised, on a machine with nothing else to do."""
NEWEST = 20
"""Answers of each stream by which to judge."""


def create(address: str, *, durability: Durability) -> None:
    with PolicyAdmin(address) as admin:
        admin.create(PolicySpec(name="p", num_examples=NUM_EXAMPLES, durability=durability))


@pytest.mark.parametrize(("durability", "lasts_s"), [("behind", 8.0), ("logged", 4.0)])
def test_memory_is_bounded_while_redis_is_slower_than_the_steps(
    house: House, durability: Durability, lasts_s: float
) -> None:
    server, _ = house.serve(sweep_min_bytes=SWEEP_MIN_BYTES, max_backlog_bytes=4 * SWEEP_MIN_BYTES)
    create(server.address, durability=durability)
    with Flow(server.address, steps_of(ROWS, high=NUM_EXAMPLES)) as flow:
        flow.make(32)  # what the first steps bring into memory for good
        before = own_bytes(server.pid)
        house.to_redis.delay_s = FAR_S
        flow.run()
        grown, unpersisted = watch(server, for_s=lasts_s, before=before)
        house.to_redis.delay_s = 0.0
        flow.pause()
    assert grown < MAX_GROWTH_BYTES, f"{grown / MIB:.0f} MiB more, {unpersisted:.0f} steps not in Redis"
    assert unpersisted < MAX_UNPERSISTED
    with PolicyAdmin(server.address) as admin:
        until(lambda: admin.get("p").durable_version == flow.sent, what="every step is durable")
        assert admin.get("p").version == flow.sent
    record(
        f"Redis 20 ms away, a stream as fast as it can ({durability})",
        promise="the log in memory is bounded; the stream waits",
        trainer=f"{flow.sent} steps; at most {unpersisted:.0f} not in Redis; memory +{max(0, grown) / MIB:.0f} MiB",
    )


def watch(server: ForkedServer, *, for_s: float, before: int) -> tuple[int, float]:
    """For so long: most memory beyond `before`, bytes, and most steps that were not in Redis."""
    end = monotonic() + for_s
    grown, unpersisted = 0, 0.0
    while monotonic() < end:
        grown = max(grown, own_bytes(server.pid) - before)
        unpersisted = max(unpersisted, gauges(server)["unpersisted_updates"])
        sleep(0.1)
    return grown, unpersisted


@pytest.mark.parametrize("one_way_s", [0.001, 0.020])
def test_after_a_stall_logged_answers_wait_for_the_log_again(house: House, one_way_s: float) -> None:
    """If answers came before their steps were durable for ever after, LOGGED would mean BEHIND."""
    house.to_redis.delay_s = one_way_s
    create(house.server.address, durability="logged")
    with ExitStack() as stack:
        flows = [
            stack.enter_context(
                Flow(house.server.address, steps_of(64, high=NUM_EXAMPLES), trainer_id=f"t{number}", in_flight=1)
            )
            for number in range(4)
        ]
        for flow in flows:
            flow.run()
        until(lambda: durable_share(flows) >= 0.9, what="answers wait for the log")
        house.to_redis.hold()
        sleep(STALL_S)
        assert durable_share(flows) < 0.9, "nobody noticed the stall"
        house.to_redis.release()
        took = until(
            lambda: durable_share(flows) >= 0.9,
            within_s=AGAIN_WITHIN_S,
            what=lambda: f"answers wait for the log again; {durable_share(flows):.0%} do",
        )
        for flow in flows:
            flow.pause()
    record(
        f"Redis {2e3 * one_way_s:.0f} ms away stands still for {STALL_S} s under four streams (logged)",
        promise="answers come before their steps are durable for a moment, and wait for the log again",
        recovered=seconds(took),
    )


def durable_share(flows: list[Flow]) -> float:
    """Of the newest answers: the share that came once their steps were durable."""
    newest = [reply for flow in flows for reply in flow.replies[-NEWEST:]]
    return sum(reply.is_durable for reply in newest) / (NEWEST * len(flows))
