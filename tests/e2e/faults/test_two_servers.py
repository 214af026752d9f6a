"""Two servers on one Redis, and policies that are deleted and created again through the one that does not own them."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from time import monotonic

import grpc
import pytest

from equipoise import Source
from equipoise.v1 import policy_pb2 as pb
from equipoise.v1.policy_pb2_grpc import PolicyServiceStub
from tests.e2e.faults.calls import connected, patiently, reason
from tests.e2e.faults.flow import Flow, steps_of
from tests.e2e.faults.house import House
from tests.e2e.faults.incarnations import Observer, violations
from tests.e2e.faults.proxy import FaultProxy, until
from tests.e2e.faults.trainers import BACKOFF
from tests.e2e.faults.training import Training
from tests.e2e.faults.zygote import ForkedServer

KNOWN_WITHIN_S = 60.0
"""5 s are promised, on a machine with nothing else to do."""
FIRST, SECOND = 1000, 5
"""Examples of the two incarnations: the answers tell them apart."""
GONE = {"NOT_OWNER", "POLICY_DELETED", "POLICY_NOT_FOUND"}
"""What a server may say of a policy that it has lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """What a server said of a policy: an incarnation's examples, or why it said nothing.

    Attributes:
        num_examples: of the incarnation that it answered with; None: it answered with none.
        reason: why not.
    """

    num_examples: int | None = None
    reason: str = ""


def hear(calls: PolicyServiceStub) -> dict[str, Heard]:
    """What a server answers to whom it concerns."""
    examples: dict[str, Callable[[], int]] = {
        "GetPolicy": lambda: calls.GetPolicy(pb.GetPolicyRequest(policy="p"), timeout=60).status.spec.num_examples,
        "ReadWeights": lambda: sum(
            len(chunk.values) // 4 for chunk in calls.ReadWeights(pb.ReadWeightsRequest(policy="p"), timeout=60)
        ),
        "CreatePolicy": lambda: (
            calls.CreatePolicy(
                pb.CreatePolicyRequest(policy=pb.PolicySpec(name="p", num_examples=SECOND)), timeout=60
            ).status.spec.num_examples
        ),
    }
    return {method: hear_one(call) for method, call in examples.items()}


def hear_one(call: Callable[[], int]) -> Heard:
    try:
        return Heard(num_examples=call())
    except grpc.RpcError as failure:
        return Heard(reason=reason(failure))


def knows(heard: dict[str, Heard]) -> bool:
    """Whether a server speaks of the first incarnation no more."""
    return all(one.num_examples == SECOND or one.reason in GONE for one in heard.values())


@pytest.fixture
def second(house: House) -> tuple[ForkedServer, FaultProxy]:
    return house.serve()


@pytest.mark.parametrize("created_again", [True, False])
@pytest.mark.parametrize("in_use", [True, False])
def test_a_policy_deleted_through_another_server_is_gone_at_its_owner(
    house: House, second: tuple[ForkedServer, FaultProxy], created_again: bool, in_use: bool
) -> None:
    with ExitStack() as stack:
        owner, other = (stack.enter_context(connected(server.address)) for server in (house.server, second[0]))
        owner.CreatePolicy(pb.CreatePolicyRequest(policy=pb.PolicySpec(name="p", num_examples=FIRST)), timeout=60)
        flows = [
            stack.enter_context(Flow(house.server.address, steps_of(4, high=FIRST), trainer_id=f"t{number}"))
            for number in range(2)
        ]
        for flow in flows:
            flow.make(1)
        if in_use:  # the next append meets the deletion; else nobody tells the owner
            flows[0].run()
            until(lambda: len(flows[0].replies) > 10, what="answers")
        delete(other, owner.GetPolicy(pb.GetPolicyRequest(policy="p"), timeout=60).status.uid)
        if created_again:
            spec = pb.PolicySpec(name="p", num_examples=SECOND)
            patiently(lambda: other.CreatePolicy(pb.CreatePolicyRequest(policy=spec), timeout=60))
        heard: dict[str, Heard] = {}

        def knows_at_last() -> bool:
            heard.update(hear(owner))
            return knows(heard)

        until(knows_at_last, within_s=KNOWN_WITHIN_S, what=lambda: f"the former owner knows; it says {heard}")
        for _ in range(20):
            assert knows_at_last(), f"the former owner went back: {heard}"
        until(
            lambda: all(flow.has_ended for flow in flows),
            within_s=KNOWN_WITHIN_S,
            what=lambda: f"both streams end; {[flow.has_ended for flow in flows]}",
        )
        assert [ending(flow) for flow in flows] == ["POLICY_DELETED", "POLICY_DELETED"]


def ending(flow: Flow) -> str:
    """Why a stream has ended."""
    assert flow.failure is not None
    return reason(flow.failure)


@pytest.mark.parametrize("rounds", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_nobody_hears_of_a_dead_incarnation_after_its_successor_and_every_trainer_goes_on(
    house: House, second: tuple[ForkedServer, FaultProxy], rounds: int
) -> None:
    """Deleted and created again under load, through the server that does not own it."""
    addresses = [house.to_server.address, second[1].address]
    ways = [",".join(addresses), ",".join(reversed(addresses)), *addresses]
    with ExitStack() as stack:
        stubs = [stack.enter_context(connected(address)) for address in addresses]
        incarnations = [create(stubs)]
        observers = [stack.enter_context(Observer(address, "p")) for address in addresses]
        trainings = [
            stack.enter_context(Training(way, trainer_id=f"t{number}", num_examples=FIRST, backoff=BACKOFF))
            for number, way in enumerate(ways)
        ]
        for _ in range(rounds):
            owner = who_owns(observers, incarnations[-1])
            dead = observers[owner].last
            other = 1 - owner
            delete(stubs[other], incarnations[-1])
            incarnations.append(create([stubs[other], stubs[owner]]))
            wait_until_known(observers, incarnations[-1])
            for training in trainings:
                assert served_epoch(training) > dead.epoch, f"{training.client.trainer_id}: {dead}"
    found = [
        f"{address}: {violation}"
        for address, observer in zip(addresses, observers, strict=True)
        for violation in violations(observer.seen, incarnations)
    ]
    assert not found, "\n".join(found[:5])
    for training in trainings:
        assert (training.stats.regressions, training.stats.refused) == (0, 0)


def create(stubs: Sequence[PolicyServiceStub]) -> str:
    """Creates the policy, unless a trainer was faster, at the first server or, if it has an owner, there; the uid."""
    request = pb.CreatePolicyRequest(policy=pb.PolicySpec(name="p", num_examples=FIRST))
    for stub in stubs:
        try:
            return patiently(lambda stub=stub: stub.CreatePolicy(request, timeout=60)).status.uid  # type: ignore[misc]
        except grpc.RpcError as failure:
            if reason(failure) != "NOT_OWNER":
                raise
    raise AssertionError("each server says that the other one owns the policy")


def delete(stub: PolicyServiceStub, uid: str) -> None:
    request = pb.DeletePolicyRequest(policy="p", uid=uid)
    assert patiently(lambda: stub.DeletePolicy(request, timeout=60)).uid == uid


def who_owns(observers: Sequence[Observer], uid: str) -> int:
    """Position of the server that answers for an incarnation."""

    def owners() -> list[int]:
        return [position for position, observer in enumerate(observers) if observer.last.uid == uid]

    until(owners, what=lambda: f"somebody owns {uid}; they say {[observer.last for observer in observers]}")
    return owners()[0]


def wait_until_known(observers: Sequence[Observer], uid: str) -> None:
    """Waits until each server answers for an incarnation or for none."""
    until(
        lambda: all(observer.last.uid == uid or observer.last.reason in GONE for observer in observers),
        within_s=KNOWN_WITHIN_S,
        what=lambda: f"both servers know of {uid}; they say {[observer.last for observer in observers]}",
    )


def served_epoch(training: Training) -> int:
    """Waits until a step that a trainer begins now is answered by a server; the epoch that it was told."""
    now = monotonic()
    until(
        lambda: training.failure or training.served_since(now),
        within_s=60,
        what=lambda: f"{training.client.trainer_id} is served; {training.stats}",
    )
    assert training.failure is None, training.failure
    return next(made.result.epoch for made in training.made if made.at > now and made.result.source is Source.SERVED)
