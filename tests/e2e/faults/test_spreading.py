"""Servers that join and leave: the policies are spread over those that are there, and no step is lost."""

from contextlib import ExitStack
from pathlib import Path
from time import monotonic, sleep

import grpc
import numpy as np
import pytest

from equipoise import Limits, PolicyClient, Source
from equipoise.v1 import policy_pb2 as pb
from equipoise_server.store.keys import heartbeat_key
from tests.e2e.faults.calls import connected, reason
from tests.e2e.faults.figures import record, seconds
from tests.e2e.faults.fleet import Fleet
from tests.e2e.faults.gauges import gauges
from tests.e2e.faults.house import House
from tests.e2e.faults.proxy import FaultProxy, until
from tests.e2e.faults.zygote import ForkedServer, Zygote
from tests.patience import PATIENT

POLICIES, LOGGED_STEPS = 9, 5_000
SPREAD_WITHIN_S = 120.0
"""Far more than it takes: a busy machine may take its time."""


def serve(house: House) -> tuple[ForkedServer, FaultProxy]:
    return house.serve(spread_policies=True)


def loads(*servers: ForkedServer) -> list[int]:
    """How many policies each has in memory."""
    return [int(gauges(server)["policies"]) for server in servers]


@pytest.mark.slow
def test_policies_are_spread_over_the_servers_of_now_and_no_step_is_lost(tmp_path: Path, zygote: Zygote) -> None:
    """One server, then three, then two: policies within 20 % of even, every step in the log exactly once."""
    with Fleet(tmp_path, zygote, policies=POLICIES, logged_steps=LOGGED_STEPS, spread_policies=True) as fleet:
        first = fleet.serve()
        fleet.train(first.address)
        assert fleet.loads() == [POLICIES]
        began = monotonic()
        fleet.serve()
        third = fleet.serve()
        grown = spread(fleet)
        assert third.stop() == 0
        shrunk = spread(fleet)
        stale = fleet.longest_stale_s(began)
        seen = fleet.finish()
    record(
        f"{POLICIES} policies with logs of {LOGGED_STEPS:,} steps; servers join, from one to three; one leaves",
        promise="spread within 20 % of even, no step lost",
        recovered=f"{grown}; {shrunk}; longest time without an answer {seconds(stale)}",
        trainer=seen,
    )


def spread(fleet: Fleet) -> str:
    """Waits until policies are spread evenly and every trainer is served; how they are spread, and after how long."""
    servers = sum(bool(server.pid) for server in fleet.servers)
    even = POLICIES / servers
    found: list[int] = []

    def is_even() -> bool:
        sleep(0.1)  # each look costs the servers a scrape
        found[:] = fleet.loads()
        return sum(found) == POLICIES and all(abs(load - even) <= 0.2 * even for load in found)

    within_s = until(is_even, within_s=SPREAD_WITHIN_S, what=lambda: f"an even spread; it is {found}")
    fleet.wait_until_served()
    return f"{' + '.join(map(str, sorted(found)))} over {servers} servers after {seconds(within_s)}"


def test_a_policy_is_created_where_it_belongs_whoever_is_asked(house: House) -> None:
    (one, before_one), (two, before_two) = serve(house), serve(house)
    with ExitStack() as stack:
        for number in range(6):
            asked = (before_one, before_two)[number % 2]
            client = PolicyClient(
                asked.address, policy=f"p{number}", num_examples=4, when_lost="wait", limits=Limits(window_steps=8)
            )
            stack.enter_context(client)
            assert client.step([0, 1], contributions=[1.0, -1.0]).version == 1
        until(lambda: loads(one, two) == [3, 3], within_s=SPREAD_WITHIN_S)


def test_a_policy_stays_where_its_trainer_can_reach_it(house: House) -> None:
    """The other server says that it is where nobody is: what belongs there is served by the one that can be reached."""
    _, before = serve(house)
    with FaultProxy(("127.0.0.1", 1)) as nowhere:
        nowhere.refuse()
        other, _ = house.serve(spread_policies=True, advertise=nowhere.address)
        with ExitStack() as stack:
            for number in range(6):
                client = PolicyClient(before.address, policy=f"p{number}", num_examples=4, when_lost="wait")
                stack.enter_context(client)
                weights = client.step([0, 1], contributions=[1.0, -1.0]).weights
                assert np.isfinite(weights).all()
        assert loads(other) == [0]


def test_who_is_sent_on_creates_the_policy_where_it_belongs(house: House) -> None:
    """Nothing is created by a call that is sent on: it would be told that somebody else has."""
    (_, before_one), (_, before_two) = serve(house), serve(house)
    sent_on = 0
    with connected(before_one.address) as one, connected(before_two.address) as two:
        for number in range(24):  # chance, as their addresses are, may send all of a few the same way
            request = pb.CreatePolicyRequest(policy=pb.PolicySpec(name=f"p{number}", num_examples=4))
            try:
                created = one.CreatePolicy(request, timeout=60)
            except grpc.RpcError as failure:
                if reason(failure) != "NOT_OWNER":
                    raise
                sent_on += 1
                created = two.CreatePolicy(request, timeout=60, metadata=(("x-equipoise-placement", "here"),))
            assert created.created
    assert 0 < sent_on < 24


def test_nothing_is_handed_over_while_redis_takes_no_writes(house: House) -> None:
    """What left memory could not be acquired again: training would stop until Redis is mended."""
    server, before = serve(house)
    with ExitStack() as stack:
        clients = [
            stack.enter_context(PolicyClient(before.address, policy=f"p{number}", num_examples=4, timeout=PATIENT))
            for number in range(4)
        ]
        for client in clients:
            client.step([0, 1], contributions=[1.0, -1.0])
            assert client.flush(durable=True)
        with house.redis.client() as redis:
            listed = next(redis.scan_iter("*:servers")).decode()
            ghost = heartbeat_key(listed.rpartition(":")[0], "ghost")
            together = redis.pipeline(transaction=True)
            together.set(ghost, "127.0.0.1:1 0 ", px=4000)
            together.zadd(listed, {"ghost": 0})
            together.config_set("maxmemory", "1")
            together.execute()
            until(lambda: not redis.exists(ghost), within_s=60)
            redis.config_set("maxmemory", "0")
        assert "handing over" not in server.log
        assert loads(server) == [4]
        assert all(client.step([0, 1], contributions=[1.0, -1.0]).source is Source.SERVED for client in clients)
