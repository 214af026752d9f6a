"""What a server says of a policy while it looks for it in Redis."""

from typing import Any

from equipoise.v1 import policy_pb2 as pb
from equipoise.v1.policy_pb2_grpc import PolicyServiceStub
from equipoise_server.store import scripts
from tests.e2e.faults.calls import connected, reason
from tests.e2e.faults.house import House
from tests.e2e.faults.proxy import At, until

ACQUIRING = scripts.ACQUIRE.sha.encode()


def test_a_search_that_began_before_a_policy_was_created_does_not_speak_for_its_creator(house: House) -> None:
    """Somebody asks for the policy; Redis says that there is none, which is a long time under way; it is created."""
    server, _ = house.serve(redis_timeout_s=60.0)
    with connected(server.address) as stub:
        create(stub, "another").result()  # from here on Redis knows the script
        with house.to_redis.trap(ACQUIRING, At.REPLY) as trap:
            asked = stub.GetPolicy.future(pb.GetPolicyRequest(policy="p"), timeout=60)
            until(lambda: trap.caught.is_set() or asked.done(), what="Redis is asked")
            created = create(stub, "p")
            until(lambda: created.done() or house.redis.command("KEYS", "*{p}:spec"), what="the policy is in Redis")
            house.to_redis.free(trap)
            failure = created.exception(60)
        assert failure is None, reason(failure)
        assert created.result().created


def create(stub: PolicyServiceStub, name: str) -> Any:
    spec = pb.PolicySpec(name=name, num_examples=4)
    return stub.CreatePolicy.future(pb.CreatePolicyRequest(policy=spec), timeout=60)
