"""Servers that join and leave: the policies are spread over those that are there, and no step is lost."""

import asyncio
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise

import grpc
import numpy as np
import pytest

from equipoise import Limits, PolicyAdmin, PolicyClient, PolicySpec, Source
from equipoise.v1 import policy_pb2 as pb
from equipoise_server.engine import PolicySpec as EngineSpec
from equipoise_server.store import RedisStore
from equipoise_server.store.keys import heartbeat_key
from tests.e2e.faults.calls import connected, reason
from tests.e2e.faults.figures import record, seconds
from tests.e2e.faults.flow import Flow, steps_of
from tests.e2e.faults.gauges import gauges
from tests.e2e.faults.house import House
from tests.e2e.faults.proxy import FaultProxy, until
from tests.e2e.faults.training import Training
from tests.e2e.faults.zygote import ForkedServer
from tests.patience import PATIENT

POLICIES = 9
TRAINERS, LOGGED_STEPS, LOGGED_ROWS = 8, 50_000, 2
NUM_EXAMPLES = 1000
SPREAD_WITHIN_S = 120.0
"""Far more than it takes: a busy machine may take its time."""


def serve(house: House) -> tuple[ForkedServer, FaultProxy]:
    return house.serve(spread_policies=True)


def loads(*servers: ForkedServer) -> list[int]:
    """How many policies each has in memory."""
    return [int(gauges(server)["policies"]) for server in servers]


@pytest.mark.slow
def test_policies_are_spread_over_the_servers_of_now_and_no_step_is_lost(house: House) -> None:
    first, before = serve(house)
    with ExitStack() as stack:
        trainings = [
            stack.enter_context(Training(before.address, policy=f"p{number}", num_examples=100))
            for number in range(POLICIES)
        ]
        assert loads(first) == [POLICIES]
        (second, _), (third, _) = serve(house), serve(house)
        spread = until(lambda: loads(first, second, third) == [3, 3, 3], within_s=SPREAD_WITHIN_S)
        for training in trainings:
            training.wait_until_durable()
        assert third.stop() == 0
        until(lambda: sorted(loads(first, second)) == [4, 5], within_s=SPREAD_WITHIN_S)
        for training in trainings:
            training.wait_until_durable()
        worst = max(training.since(0.0).longest_step_s for training in trainings)
        unserved = sum(training.since(0.0).unserved for training in trainings)
    for training in trainings:
        training.assert_kept()
    record(
        "policies spread over joining servers",
        recovered=f"9 policies from one server to three in {spread:.0f} s, worst step {worst:.2f} s",
        trainer=f"{unserved} steps unserved",
    )


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


def fill(house: House, address: str, names: list[str]) -> None:
    """Creates policies with the same long log: the first one's is made step by step, and copied."""
    first, *others = names
    with PolicyAdmin(address) as admin:
        admin.create(PolicySpec(name=first, num_examples=NUM_EXAMPLES, durability="behind"))
        with Flow(address, steps_of(LOGGED_ROWS, high=NUM_EXAMPLES), policy=first, in_flight=512) as flow:
            flow.make(LOGGED_STEPS, within_s=300)
        until(lambda: admin.get(first).durable_version == LOGGED_STEPS, within_s=120, what="every step is durable")
    asyncio.run(copy(house, first, others))


async def copy(house: House, source: str, names: list[str]) -> None:
    """Policies that are what another one is in Redis."""
    store = RedisStore.connect(f"redis://127.0.0.1:{house.redis.port}")
    stored = await store.get(source)
    assert stored is not None
    for name in names:
        spec = replace(EngineSpec.from_json(stored.spec), name=name).to_json()
        await store.create(replace(stored, name=name, uid=f"{stored.uid}{name}", spec=spec))
    await store.close()
    with house.redis.client() as redis:
        log = next(redis.scan_iter(f"*{{{source}}}*:log")).decode()
        for name in names:
            copied = log.replace(f"{{{source}}}", f"{{{name}}}").replace(stored.uid, f"{stored.uid}{name}")
            assert redis.xlen(copied) == 0
            redis.restore(copied, 0, redis.dump(log), replace=True)


def longest_stale_s(training: Training) -> float:
    """Longest time between two answers of the server, in which weights are older than the step."""
    served = [made.at + made.seconds for made in training.made if made.result.source is Source.SERVED]
    return max(after - before for before, after in pairwise(served))


@pytest.mark.slow
def test_servers_come_go_and_restart_one_after_another_under_policies_with_long_logs(house: House) -> None:
    """From one server to three, each of them restarted in turn, then one leaves; every step counts exactly once."""
    first, before = serve(house)
    names = [f"p{number}" for number in range(TRAINERS)]
    fill(house, before.address, names)
    with ExitStack() as stack:
        trainings = [
            stack.enter_context(Training(before.address, policy=name, num_examples=NUM_EXAMPLES)) for name in names
        ]

        def worst_until_spread(expected: list[int], *servers: ForkedServer) -> str:
            until(lambda: sorted(loads(*servers)) == expected, within_s=SPREAD_WITHIN_S)
            for training in trainings:
                training.wait_until_durable()
            return seconds(max(longest_stale_s(training) for training in trainings))

        second, third = serve(house)[0], serve(house)[0]
        stale = {"to three servers": worst_until_spread([2, 3, 3], first, second, third)}
        for server in (second, third, first):
            assert server.stop() == 0
            server.start()
            stale["restarts"] = worst_until_spread([2, 3, 3], first, second, third)
        assert third.stop() == 0
        stale["to two"] = worst_until_spread([4, 4], first, second)
    unserved = sum(training.since(0.0).unserved for training in trainings)
    with PolicyAdmin(before.address) as admin:
        for name, training in zip(names, trainings, strict=True):
            training.assert_kept()
            assert admin.get(name).version == LOGGED_STEPS + training.stats.steps
    record(
        f"rolling restart of three servers, {TRAINERS} policies with {LOGGED_STEPS} steps in the log",
        promise="no failed step, no lost one, stale weights for 2 s at most",
        recovered="longest time without an answer so far: " + ", ".join(f"{what} {s}" for what, s in stale.items()),
        trainer=f"{unserved} steps on older weights",
    )
