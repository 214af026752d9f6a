"""Bytes of all kinds on the wire: each is answered by the right error, and connection and server survive."""

import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given, seed
from hypothesis import strategies as st

from equipoise.v1 import policy_pb2 as pb
from equipoise.v1.policy_pb2_grpc import PolicyServiceStub
from tests.e2e.faults.gauges import own_bytes
from tests.e2e.fuzz.seeds import SEED, announce, effort
from tests.servers import ServerProcess, serve

SERVICE = pb.DESCRIPTOR.services_by_name["PolicyService"]
POLICY = "wire"
MIB = 1 << 20
LIMIT_MIB = 16
TIMEOUT_S = 30
IDS = np.array([0, 1], "<u8").tobytes()
STEP = pb.StepRequest(sequence=1, example_ids=IDS, contributions=b"\0" * 8, losses=b"\0" * 8, target_loss=1.0)
SPEC = pb.PolicySpec(name="other", num_examples=8, rule=pb.RuleSpec(settings={"floor": pb.SettingValue(number=0.1)}))

VALID: dict[str, list[Message]] = {
    "CreatePolicy": [pb.CreatePolicyRequest(policy=SPEC)],
    "GetPolicy": [pb.GetPolicyRequest(policy=POLICY)],
    "ListPolicies": [pb.ListPoliciesRequest(page_size=2, page_token="a", prefix="w")],
    "DeletePolicy": [pb.DeletePolicyRequest(policy="other")],
    "Exchange": [
        pb.ExchangeRequest(open=pb.OpenRequest(policy=POLICY, trainer_id="t")),
        pb.ExchangeRequest(step=STEP),
    ],
    "UpdateWeights": [pb.UpdateWeightsRequest(policy=POLICY, trainer_id="u", step=STEP)],
    "ReadWeights": [pb.ReadWeightsRequest(policy=POLICY, field=pb.FIELD_SCORE, example_ids=IDS)],
    "SampleExamples": [pb.SampleExamplesRequest(policy=POLICY, count=3, seed=1)],
    "WatchPolicy": [pb.WatchPolicyRequest(policy=POLICY, min_interval_ms=100)],
    "ExportPolicy": [pb.ExportPolicyRequest(policy=POLICY)],
    "ImportPolicy": [
        pb.ImportPolicyRequest(header=pb.StateHeader(spec=SPEC, columns={"ema": "float32"}, scalars={"x": 1.0})),
        pb.ImportPolicyRequest(chunk=pb.StateChunk(column="ema", data=b"\0" * 32)),
    ],
    "GetServerInfo": [pb.GetServerInfoRequest()],
}
"""Messages that each method understands."""

OURS = {"UNKNOWN", "INTERNAL", "DATA_LOSS", "CANCELLED", "UNIMPLEMENTED"}
"""Codes that no bytes may bring about: they would be bugs of the server."""


@st.composite
def mutated(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes that were valid: a few places are changed, dropped, doubled, or cut off."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 4)))
        data = data[:start] + draw(st.binary(max_size=6) | st.just(data[start:end] * 2)) + data[end:]
    return data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data


@st.composite
def conversations(draw: st.DrawFn) -> tuple[str, list[bytes]]:
    """A method and the messages that it is sent; the first ones may be valid."""
    method = draw(st.sampled_from(sorted(VALID)))
    messages = [message.SerializeToString() for message in VALID[method]]
    place = draw(st.integers(0, len(messages) - 1))
    messages[place] = draw(st.binary(max_size=64) | mutated(messages[place]))
    return method, messages


class Connection:
    """One HTTP/2 connection that is to survive everything."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.insecure_channel(
            address,
            options=[
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.max_send_message_length", -1),
                ("grpc.enable_retries", 0),
            ],
        )
        self.states: list[grpc.ChannelConnectivity] = []
        self.stub = PolicyServiceStub(self.channel)
        self.stub.CreatePolicy(pb.CreatePolicyRequest(policy=pb.PolicySpec(name=POLICY, num_examples=8)))
        ready = threading.Event()  # grpc tells states from a thread of its own

        def on_state(state: grpc.ChannelConnectivity) -> None:
            self.states.append(state)
            if state is grpc.ChannelConnectivity.READY:
                ready.set()

        self.channel.subscribe(on_state)
        assert ready.wait(TIMEOUT_S), self.states

    def send(self, method: str, messages: list[bytes], **options: Any) -> grpc.RpcError | None:
        """Sends bytes as they are; the error, or None for success. Endless answers are cut off."""
        description = SERVICE.methods_by_name[method]
        path = f"/{SERVICE.full_name}/{method}"
        options = {"timeout": TIMEOUT_S} | options
        try:
            if not description.client_streaming and not description.server_streaming:
                self.channel.unary_unary(path)(messages[0], **options)
            elif not description.server_streaming:
                self.channel.stream_unary(path)(iter(messages), **options)
            elif not description.client_streaming:
                answers = self.channel.unary_stream(path)(messages[0], **options)
                next(answers, None)
                answers.cancel()
            else:
                for _ in self.channel.stream_stream(path)(iter(messages), **options):
                    pass
        except grpc.RpcError as error:
            return error
        return None

    def check(self) -> None:
        """It was never lost, and the server still answers the way it should."""
        assert self.stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=TIMEOUT_S).api_version == "v1"
        assert set(self.states) <= {grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.IDLE}


@pytest.fixture(scope="module")
def wire_server() -> Iterator[ServerProcess]:
    with serve(max_examples=10_000, max_batch_examples=4096) as process:
        yield process


@pytest.fixture
def connection(wire_server: ServerProcess) -> Iterator[Connection]:
    opened = Connection(wire_server.address)
    yield opened
    opened.check()
    opened.channel.close()


def reason(error: grpc.RpcError | None) -> str:
    """The ErrorInfo's; empty where the error is not from our code."""
    assert error is not None
    info = error_details_pb2.ErrorInfo()
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            status_pb2.Status.FromString(value).details[0].Unpack(info)
    return info.reason


def is_valid(method: str, data: bytes) -> bool:
    try:
        type(VALID[method][0])().ParseFromString(data)
    except DecodeError:
        return False
    return True


@pytest.mark.parametrize("examples", [400, pytest.param(8_000, marks=pytest.mark.slow)])
def test_bytes_are_answered_as_what_they_are(connection: Connection, wire_server: ServerProcess, examples: int) -> None:
    announce()

    @seed(SEED)
    @effort(examples)
    @given(conversations())
    def fuzz(conversation: tuple[str, list[bytes]]) -> None:
        method, messages = conversation
        error = connection.send(method, messages)
        if not is_valid(method, messages[0]):
            assert error is not None
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert reason(error) == "MALFORMED_REQUEST"
        elif error is not None:
            assert error.code().name not in OURS, error
            assert reason(error), error

    fuzz()
    connection.check()
    assert "unexpected error" not in wire_server.log


@seed(SEED)
@effort(60)
@given(
    st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126), max_size=40),
    st.binary(max_size=40),
    st.sampled_from(["x-equipoise-policy", "authorization", "grpc-timeout-x", "x-a"]),
)
def headers(connection: Connection, text: str, binary: bytes, name: str) -> None:
    error = connection.send(
        "GetPolicy", [VALID["GetPolicy"][0].SerializeToString()], metadata=((name, text), (f"{name}-bin", binary))
    )
    if error is not None:
        assert name == "x-equipoise-policy"
        assert reason(error) == "POLICY_MISMATCH"


def test_headers_of_all_kinds_change_nothing(connection: Connection) -> None:
    announce()
    headers(connection)


def test_headers_that_are_too_long_are_refused(connection: Connection) -> None:
    error = connection.send("GetServerInfo", [b""], metadata=(("x-long", "x" * 40_000),))
    assert error is not None
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("method", ["GetPolicy", "Exchange", "ImportPolicy"])
@pytest.mark.parametrize("size_mib", [LIMIT_MIB + 1, 4 * LIMIT_MIB])
def test_a_message_over_the_limit_is_refused(connection: Connection, method: str, size_mib: int) -> None:
    error = connection.send(method, [b"\0" * (size_mib * MIB)])
    assert error is not None
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in (error.details() or "")


@pytest.mark.parametrize("method", ["GetPolicy", "Exchange"])
def test_a_compression_bomb_is_defused(connection: Connection, wire_server: ServerProcess, method: str) -> None:
    bomb = b"\0" * (128 * MIB)
    before = own_bytes(wire_server.pid)
    error = connection.send(method, [bomb], compression=grpc.Compression.Gzip)
    assert error is not None
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert own_bytes(wire_server.pid) - before < 64 * MIB


def test_within_the_limit_compression_is_fine(connection: Connection) -> None:
    request = pb.ReadWeightsRequest(policy=POLICY, example_ids=IDS * 1000)
    data = request.SerializeToString()
    assert connection.send("ReadWeights", [data], compression=grpc.Compression.Gzip) is None


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """An HTTP/2 frame."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


@st.composite
def floods(draw: st.DrawFn) -> bytes:
    """What no HTTP/2 client sends: noise, other protocols, frames that are nonsense."""
    kind = draw(st.sampled_from(["noise", "http/1.1", "frames"]))
    if kind == "noise":
        return draw(st.binary(max_size=200))
    if kind == "http/1.1":
        return b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\n" + draw(st.binary(max_size=20))
    frames = st.builds(
        frame, st.integers(0, 12), st.integers(0, 255), st.integers(0, 2**32 - 1), st.binary(max_size=40)
    )
    return PREFACE + frame(4, 0, 0, b"") + b"".join(draw(st.lists(frames, max_size=5)))


def test_connections_that_are_no_http2_harm_nobody(connection: Connection, wire_server: ServerProcess) -> None:
    announce()
    host, _, port = wire_server.address.rpartition(":")
    open_files = psutil.Process(wire_server.pid).num_fds

    @seed(SEED)
    @effort(60)
    @given(floods())
    def flood(data: bytes) -> None:
        with socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as raw:
            raw.sendall(data)
            raw.shutdown(socket.SHUT_WR)
            try:
                while raw.recv(65536):
                    pass
            except ConnectionError:
                pass

    before = open_files()
    flood()
    connection.check()
    assert open_files() <= before + 2
