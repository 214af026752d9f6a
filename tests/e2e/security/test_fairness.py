"""A tenant whose steps take long does not keep others waiting for all of them."""

import threading
from collections.abc import Iterator
from contextlib import suppress

import grpc
import numpy as np
import pytest

from equipoise import PolicyClient
from equipoise.v1 import policy_pb2 as pb
from equipoise.v1.policy_pb2_grpc import PolicyServiceStub
from tests.e2e.faults.proxy import until
from tests.servers import ServerProcess, serve

IN_FLIGHT = 24


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with serve(device="cpu") as process:
        yield process


class Greedy:
    """A stream that sends all its steps at once, and counts the answers."""

    def __init__(self, stub: PolicyServiceStub, policy: str, *, num_examples: int, rows: int) -> None:
        self.answers = 0
        self._calls = [pb.ExchangeRequest(open=pb.OpenRequest(policy=policy, trainer_id="greedy"))]
        random = np.random.default_rng(0)
        for sequence in range(1, IN_FLIGHT + 1):
            ids = random.choice(num_examples, rows, replace=False).astype("<u8").tobytes()
            statistics = random.standard_normal(rows).astype("<f4").tobytes()
            step = pb.StepRequest(sequence=sequence, example_ids=ids, contributions=statistics)
            self._calls.append(pb.ExchangeRequest(step=step))
        self._stream = stub.Exchange(iter(self._calls))
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with suppress(grpc.RpcError):  # the test has ended
            for answer in self._stream:
                self.answers += answer.HasField("step")


def test_short_steps_do_not_wait_for_steps_on_all_rows(server: ServerProcess) -> None:
    name, num_examples, rows = "greedy", 5_000_000, 64
    with grpc.insecure_channel(server.address) as channel:
        stub = PolicyServiceStub(channel)
        spec = pb.PolicySpec(name=name, num_examples=num_examples, rule=pb.RuleSpec(name="projected_gradient"))
        stub.CreatePolicy(pb.CreatePolicyRequest(policy=spec))
        with PolicyClient(
            server.address, policy="short", num_examples=100, when_lost="wait", durability="behind"
        ) as client:
            client.step([0], contributions=[1.0])
            greedy = Greedy(stub, name, num_examples=num_examples, rows=rows)
            until(lambda: greedy.answers >= 1, what="the long steps are under way")
            before = greedy.answers
            for number in range(IN_FLIGHT):
                client.step([number], contributions=[1.0])
            meanwhile = greedy.answers - before
        until(lambda: greedy.answers == IN_FLIGHT, what="the long steps end", within_s=120)
    assert meanwhile < IN_FLIGHT - before, "as many short steps took longer than all long ones"
