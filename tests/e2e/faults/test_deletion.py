"""A policy that is deleted while calls to it are under way: none of them hangs."""

from contextlib import ExitStack

import numpy as np
import pytest

from equipoise.v1 import policy_pb2 as pb
from tests.e2e.faults.calls import connected, reason
from tests.e2e.faults.flow import Flow, steps_of
from tests.e2e.faults.gauges import own_bytes
from tests.e2e.faults.house import House
from tests.e2e.faults.proxy import until

CALLS = 8
COSTLY = 3_000_000
"""Examples of a policy of which each step takes some 50 ms."""
PATIENCE_S = 60.0
"""A call that is still there after so long hangs: all of them together take 1 s where nothing else runs."""

KEPT_BYTES = 64 << 20
"""What a server may keep of what large steps made it take: it is warm from then on. Without a collection: 250 MiB."""


def test_calls_under_way_end_when_their_policy_is_deleted(house: House) -> None:
    spec = pb.PolicySpec(name="p", num_examples=COSTLY, rule=pb.RuleSpec(name="projected_gradient"))
    random = np.random.default_rng(0)
    step = pb.StepRequest(
        example_ids=random.integers(0, COSTLY, 64).astype("<u8").tobytes(),
        contributions=random.standard_normal(64).astype("<f4").tobytes(),
    )
    with connected(house.server.address) as calls:
        calls.CreatePolicy(pb.CreatePolicyRequest(policy=spec), timeout=PATIENCE_S)
        request = pb.UpdateWeightsRequest(policy="p", step=step)
        under_way = [calls.UpdateWeights.future(request, timeout=2 * PATIENCE_S) for _ in range(CALLS)]
        until(lambda: any(call.done() for call in under_way), within_s=PATIENCE_S, what="the first is answered")
        assert not all(call.done() for call in under_way)
        calls.DeletePolicy(pb.DeletePolicyRequest(policy="p"), timeout=PATIENCE_S)
        until(
            lambda: all(call.done() for call in under_way),
            within_s=PATIENCE_S,
            what=lambda: f"all {CALLS} end; {sum(call.done() for call in under_way)} have",
        )
        ended = [call.exception() for call in under_way]
    assert {reason(failure) for failure in ended if failure} <= {"POLICY_DELETED", "POLICY_NOT_FOUND"}


@pytest.mark.slow
def test_memory_of_large_steps_comes_back_when_their_policy_is_deleted(house: House) -> None:
    num_examples, rows = 2_000_000, 262_144
    spec = pb.PolicySpec(name="p", num_examples=num_examples, durability=pb.DURABILITY_LOGGED)
    before = own_bytes(house.server.pid)
    for turn in range(4):
        with connected(house.server.address) as calls, ExitStack() as stack:
            calls.CreatePolicy(pb.CreatePolicyRequest(policy=spec), timeout=PATIENCE_S)
            flows = [
                stack.enter_context(
                    Flow(house.server.address, steps_of(rows, high=num_examples), trainer_id=f"t{turn}-{number}")
                )
                for number in range(8)
            ]
            for flow in flows:
                flow.run()
            until(lambda flows=flows: sum(len(flow.replies) for flow in flows) > 40, within_s=PATIENCE_S)
            calls.DeletePolicy(pb.DeletePolicyRequest(policy="p"), timeout=PATIENCE_S)
            until(lambda flows=flows: all(flow.has_ended for flow in flows), within_s=PATIENCE_S)
    until(
        lambda: own_bytes(house.server.pid) - before < KEPT_BYTES,
        within_s=PATIENCE_S,
        what=lambda: f"back to {before >> 20} MiB; there are {own_bytes(house.server.pid) >> 20}",
    )
