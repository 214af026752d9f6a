"""SIGTERM where no stream holds the server up: everything that was answered is kept, and nobody is left waiting."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

import grpc
import numpy as np
import pytest

from equipoise import PolicyAdmin, PolicySpec
from equipoise.v1 import policy_pb2 as pb
from equipoise.v1.policy_pb2_grpc import PolicyServiceStub
from tests.e2e.faults.calls import connected, reason
from tests.e2e.faults.figures import record, seconds
from tests.e2e.faults.flow import Flow, steps_of
from tests.e2e.faults.gauges import calls_begun
from tests.e2e.faults.house import House
from tests.e2e.faults.proxy import until
from tests.e2e.faults.zygote import ForkedServer

NUM_EXAMPLES = 100_000
STEPS, ROWS = 200, 8192
FAR_S = 0.010
"""One way: a Redis 20 ms away."""
ROUNDS = 3
"""Whether a stop comes before the last append is a race: it is run more than once."""
CALLS = 80
SLOW = PolicySpec(name="slow", num_examples=1_000_000, rule="projected_gradient")
"""A policy whose steps cost the server some 40 ms."""
GRACE_S = 35.0
STOPPED_WITHIN_S = 25.0
"""The calls take some 3 s where nothing else runs."""


def stop_right_after_the_answers(server: ForkedServer, policy: str) -> None:
    """A stream with BEHIND is answered, ends, and the server is stopped in order at once: what it has afterwards."""
    with PolicyAdmin(server.address) as admin:
        admin.create(PolicySpec(name=policy, num_examples=NUM_EXAMPLES, durability="behind"))
    with Flow(server.address, steps_of(ROWS, high=NUM_EXAMPLES), policy=policy) as flow:
        flow.make(STEPS)
    assert server.stop() == 0
    server.start()
    with PolicyAdmin(server.address) as admin:
        assert admin.get(policy).version == STEPS


def test_a_stop_right_after_the_last_stream_has_ended_keeps_every_answered_step(house: House) -> None:
    server, _ = house.serve(own_redis=True)
    for number in range(ROUNDS):
        stop_right_after_the_answers(server, f"p-{number}")


def test_it_keeps_them_where_redis_is_far_away(house: House) -> None:
    house.to_redis.delay_s = FAR_S
    stop_right_after_the_answers(house.server, "p")


def test_a_server_that_hands_over_is_named_to_nobody(house: House) -> None:
    """Who asks another server meanwhile is told to wait: the address of one that is about to end would be of no use."""
    (server, _), (other, _) = house.serve(drain_grace_s=GRACE_S), house.serve()
    with PolicyAdmin(server.address) as admin:
        admin.create(PolicySpec(name="p", num_examples=4))
    with stubborn_stream(server.address), connected(other.address) as stub:
        server.terminate()

        def why() -> str:
            with pytest.raises(grpc.RpcError) as refused:
                stub.GetPolicy(pb.GetPolicyRequest(policy="p"), timeout=4)
            return reason(refused.value)

        until(lambda: why() != "NOT_OWNER", what="the other server knows")
        assert why() == "LOADING"
    assert server.join() == 0
    with PolicyAdmin(other.address) as admin:
        until(lambda: admin.get("p").epoch == 2)


def test_a_stop_under_unary_calls_answers_each_and_does_not_wait_out_its_grace(house: House) -> None:
    server, _ = house.serve(drain_grace_s=GRACE_S)
    with PolicyAdmin(server.address) as admin:
        admin.create(SLOW)
    request = a_step()
    with grpc.insecure_channel(server.address) as channel:
        update = PolicyServiceStub(channel).UpdateWeights
        calls = [update.future(request, timeout=4 * GRACE_S) for _ in range(CALLS)]
        until(lambda: calls_begun(server, "UpdateWeights") == CALLS, what="the calls are under way")
        until(lambda: any(call.done() for call in calls), what="the first is answered, and more are being worked on")
        assert not all(call.done() for call in calls)
        began = monotonic()
        assert server.stop() == 0
        took = monotonic() - began
        until(lambda: all(call.done() for call in calls), what="every call ends")
        ended = Counter(call.code() for call in calls)
    assert set(ended) <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}, ended
    assert took < STOPPED_WITHIN_S
    server.start()
    with PolicyAdmin(server.address) as admin:
        assert admin.get(SLOW.name).version == ended[grpc.StatusCode.OK]  # none was applied and not answered
    record(
        f"SIGTERM with {CALLS} unary calls under way, each of some 40 ms",
        promise=f"each ends; exit 0 before the end of the grace ({GRACE_S:g} s)",
        recovered=f"ended after {seconds(took)}",
        trainer=", ".join(f"{count} {code.name}" for code, count in ended.items()),
    )


@contextmanager
def stubborn_stream(address: str) -> Iterator[None]:
    """A stream that stays though it is asked to leave."""
    leaving = threading.Event()

    def messages() -> Iterator[pb.ExchangeRequest]:
        yield pb.ExchangeRequest(open=pb.OpenRequest(policy="p", trainer_id="stubborn"))
        leaving.wait()

    with connected(address) as stub:
        call = stub.Exchange(messages())
        assert next(call).HasField("opened")
        try:
            yield
        finally:
            leaving.set()
            call.cancel()


def a_step() -> pb.UpdateWeightsRequest:
    random = np.random.default_rng(0)
    ids = random.choice(SLOW.num_examples, 64, replace=False).astype("<u8")
    contributions = random.standard_normal(64).astype("<f4")
    step = pb.StepRequest(example_ids=ids.tobytes(), contributions=contributions.tobytes())
    return pb.UpdateWeightsRequest(policy=SLOW.name, step=step)
