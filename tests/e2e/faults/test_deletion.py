"""A policy that is deleted while calls to it are under way: none of them hangs."""

import numpy as np

from equipoise.v1 import policy_pb2 as pb
from tests.e2e.faults.calls import connected, reason
from tests.e2e.faults.house import House
from tests.e2e.faults.proxy import until

CALLS = 8
COSTLY = 3_000_000
"""Examples of a policy of which each step takes some 50 ms."""
PATIENCE_S = 60.0
"""A call that is still there after so long hangs: all of them together take 1 s where nothing else runs."""


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
