"""Messages that no client of ours sends, and too many of them: refused for what they are, and the others served."""

import gzip
import threading
from collections.abc import Iterator
from time import monotonic

import grpc
import numpy as np
import pytest

from equipoise import PolicyClient, Timeout
from equipoise.v1 import policy_pb2 as pb
from equipoise.v1 import policy_pb2_grpc
from tests.e2e.faults.figures import record, seconds
from tests.e2e.faults.gauges import own_bytes
from tests.e2e.faults.house import House
from tests.e2e.faults.training import Training
from tests.patience import PATIENT

MIB = 1 << 20
SERVICE = "/equipoise.v1.PolicyService/"


@pytest.fixture
def channel(house: House) -> Iterator[grpc.Channel]:
    options = [("grpc.max_send_message_length", -1), ("grpc.max_metadata_size", 1 << 20)]
    with grpc.insecure_channel(house.server.address, options=options) as connected:
        yield connected


def update(rows: int) -> pb.UpdateWeightsRequest:
    ids = np.arange(rows, dtype="<u8").tobytes()
    return pb.UpdateWeightsRequest(policy="p", step=pb.StepRequest(example_ids=ids, losses=bytes(4 * rows)))


def code_of(call: object, *arguments: object, **options: object) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, timeout=30, **options)  # type: ignore[operator]
    code: grpc.StatusCode = caught.value.code()
    return code


def test_oversize_bombs_and_long_headers_are_refused_and_the_connection_lives(
    house: House, channel: grpc.Channel
) -> None:
    stub = policy_pb2_grpc.PolicyServiceStub(channel)
    with PolicyClient(house.server.address, policy="p", num_examples=4 * MIB, when_lost="wait") as client:
        client.read([0])
    before = own_bytes(house.server.pid)
    for rows in (2 * MIB, 4 * MIB):  # 24 and 48 MiB, the limit is 16
        assert code_of(stub.UpdateWeights, update(rows)) is grpc.StatusCode.RESOURCE_EXHAUSTED
    bomb = channel.unary_unary(
        SERVICE + "UpdateWeights", request_serializer=lambda data: data, response_deserializer=lambda data: data
    )
    zeros = pb.UpdateWeightsRequest(policy="p", step=pb.StepRequest(losses=bytes(64 * MIB))).SerializeToString()
    assert len(gzip.compress(zeros)) < MIB
    assert code_of(bomb, zeros, compression=grpc.Compression.Gzip) is grpc.StatusCode.RESOURCE_EXHAUSTED
    header = (("x-long", "x" * 40_000),)
    assert code_of(stub.GetServerInfo, pb.GetServerInfoRequest(), metadata=header) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert stub.GetPolicy(pb.GetPolicyRequest(policy="p"), timeout=60).status.version == 0
    assert own_bytes(house.server.pid) - before < 64 * MIB
    record(
        "messages of 24 and 48 MiB, a gzip bomb of 64 MiB, 40 kB of headers",
        promise="RESOURCE_EXHAUSTED; memory bounded; the connection lives",
        trainer=f"memory of the server +{max(0, own_bytes(house.server.pid) - before) / MIB:.0f} MiB",
    )


def test_a_message_with_fields_of_a_later_version_is_taken(house: House, channel: grpc.Channel) -> None:
    with PolicyClient(house.server.address, policy="p", num_examples=4, timeout=PATIENT) as client:
        client.read([0])
    call = channel.unary_unary(
        SERVICE + "GetPolicy",
        request_serializer=lambda data: data,
        response_deserializer=pb.GetPolicyResponse.FromString,
    )
    later = pb.GetPolicyRequest(policy="p").SerializeToString() + b"\xfa\x3f\x05later"  # field 1023, bytes
    assert call(later, timeout=60).status.spec.num_examples == 4


@pytest.mark.slow
def test_silent_idle_and_deaf_streams(house: House) -> None:
    """Streams that never open, that say nothing, and that never read their answers: others are served as before."""
    server, before = house.serve(first_message_timeout_s=5.0)
    with Training(before.address, timeout=Timeout(step=20.0)) as training:
        training.wait_until_durable()
        memory_before = own_bytes(server.pid)
        with grpc.insecure_channel(server.address) as channel:
            stub = policy_pb2_grpc.PolicyServiceStub(channel)
            stop = threading.Event()
            began = monotonic()
            silent = [stub.Exchange(nothing_until(stop)) for _ in range(100)]
            idle = [stub.Exchange(opening_then_nothing(stop, f"idle-{n}")) for n in range(200)]
            for call in idle:
                assert next(call).HasField("opened")
            deaf = [stub.Exchange(many_reads(stop, f"deaf-{n}")) for n in range(20)]
            for call in silent:
                with pytest.raises(grpc.RpcError) as caught:
                    next(call)
                assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            ended = monotonic() - began
            training.wait_until_served()
            seen = training.since(began)
            grown = own_bytes(server.pid) - memory_before
            stop.set()
            for call in (*idle, *deaf):
                call.cancel()
    assert seen.unserved == 0
    assert grown < 300 * MIB
    record(
        "100 streams that never open, 200 idle ones, 20 that never read their answers",
        promise="the first are ended after 5 s (10 s by default), the others bounded; trainers are served",
        noticed=f"ended after {seconds(ended)}",
        trainer=f"{seen}; memory +{grown / MIB:.0f} MiB",
    )


def nothing_until(stop: threading.Event) -> Iterator[pb.ExchangeRequest]:
    stop.wait(60)
    yield from ()


def opening_then_nothing(stop: threading.Event, trainer_id: str) -> Iterator[pb.ExchangeRequest]:
    yield pb.ExchangeRequest(open=pb.OpenRequest(policy="p", trainer_id=trainer_id))
    stop.wait(60)


def many_reads(stop: threading.Event, trainer_id: str) -> Iterator[pb.ExchangeRequest]:
    yield pb.ExchangeRequest(open=pb.OpenRequest(policy="p", trainer_id=trainer_id))
    ids = np.tile(np.arange(1000, dtype="<u8"), 20).tobytes()
    for _ in range(2000):
        if stop.is_set():
            return
        yield pb.ExchangeRequest(step=pb.StepRequest(example_ids=ids))
