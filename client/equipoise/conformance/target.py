"""The server under test: raw stubs, policies that are deleted at the end, and streams."""

import itertools
import queue
import secrets
from collections.abc import Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, cast

import grpc
import numpy as np

from equipoise.channel import OPTIONS, Server
from equipoise.v1 import policy_pb2 as pb
from equipoise.v1.policy_pb2_grpc import PolicyServiceStub

OWN_OPTIONS: dict[str, int | str] = {"grpc.max_send_message_length": -1, "grpc.enable_retries": 0}
"""What a check sends must reach the server, and what comes must be what the server said."""


class Target:
    """A server under test. Every policy that a check creates has the prefix, and is deleted at the end.

    Args:
        server: where it is, and how it is reached.
        prefix: what the names of the policies begin with.
        timeout_s: longest wait for any answer.
    """

    def __init__(self, server: Server, *, prefix: str, timeout_s: float) -> None:
        self.server = server
        self.prefix = f"{prefix}{secrets.token_hex(4)}-"
        self.timeout_s = timeout_s
        self.channel = self._open(server)
        self.info = pb.GetServerInfoResponse()
        """As the server gave it."""
        self._names = (f"{self.prefix}{number}" for number in itertools.count(1))

    def connect(self) -> None:
        """Asks the server about itself. Raises grpc.RpcError when it is not reached."""
        stub: Any = PolicyServiceStub(self.channel)
        metadata = self.server.headers()
        self.info = stub.GetServerInfo(
            pb.GetServerInfoRequest(), timeout=self.timeout_s, metadata=metadata, wait_for_ready=True
        )

    def call(self, method: str, request: Any, *, policy: str = "", metadata: Any = None) -> Any:
        """Calls a unary method."""
        headers = self.server.headers(policy) if metadata is None else metadata
        return getattr(PolicyServiceStub(self.channel), method)(request, timeout=self.timeout_s, metadata=headers)

    def read(self, method: str, request: Any, *, policy: str) -> list[Any]:
        """All messages of a method that streams its answer."""
        return list(self.call(method, request, policy=policy))

    def new_name(self) -> str:
        """A name that no policy has."""
        return next(self._names)

    def create(self, *, num_examples: int = 8, **fields: Any) -> str:
        """Creates a policy and returns its name; `fields` are those of its PolicySpec."""
        name = self.new_name()
        spec = pb.PolicySpec(name=name, num_examples=num_examples, **fields)
        self.call("CreatePolicy", pb.CreatePolicyRequest(policy=spec), policy=name)
        return name

    def status(self, policy: str) -> pb.PolicyStatus:
        """How a policy stands."""
        return cast(pb.PolicyStatus, self.call("GetPolicy", pb.GetPolicyRequest(policy=policy), policy=policy).status)

    def weights(self, policy: str, field: "pb.Field.ValueType" = pb.FIELD_WEIGHT) -> bytes:
        """Weights or scores of all examples, as they come."""
        request = pb.ReadWeightsRequest(policy=policy, field=field)
        return b"".join(chunk.values for chunk in self.read("ReadWeights", request, policy=policy))

    def conversation(self, policy: str, trainer_id: str = "trainer", **fields: Any) -> "Conversation":
        """A stream whose opening is sent; `fields` are those of its OpenRequest."""
        stream = Conversation(self.channel, self.server.headers(policy), timeout_s=self.timeout_s)
        stream.send(pb.ExchangeRequest(open=pb.OpenRequest(policy=policy, trainer_id=trainer_id, **fields)))
        return stream

    def raw(self, method: str, *messages: bytes, metadata: Any = None) -> list[bytes]:
        """Calls `/package.Service/Method` with bytes."""
        headers = self.server.headers() if metadata is None else metadata
        call: Any = self.channel.stream_stream(method)  # without serializers it takes and gives bytes
        return list(call(iter(messages), timeout=self.timeout_s, metadata=headers))

    def clean_up(self) -> list[str]:
        """Deletes all policies with the prefix; the names of those that may be left."""
        left: list[str] = []
        names = list(self._created())
        for place, name in enumerate(names):
            try:
                self.call("DeletePolicy", pb.DeletePolicyRequest(policy=name), policy=name)
            except grpc.RpcError as failure:
                if failure.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    return [*left, *names[place:]]  # the server is not there: each more would take its time
                if failure.code() is not grpc.StatusCode.NOT_FOUND:
                    left.append(name)
        return left

    def _created(self) -> Iterator[str]:
        """The names a server lists, and those it should: one that is wrong about its lists is not to keep policies."""
        listed = set()
        token = ""
        with suppress(grpc.RpcError):
            while True:
                request = pb.ListPoliciesRequest(prefix=self.prefix, page_token=token)
                page = self.call("ListPolicies", request)
                listed |= {policy.spec.name for policy in page.policies if policy.spec.name.startswith(self.prefix)}
                if not page.next_page_token or page.next_page_token == token:
                    break
                token = page.next_page_token
        last = int(self.new_name().removeprefix(self.prefix))
        yield from sorted(listed | {f"{self.prefix}{number}" for number in range(1, last)})

    def close(self) -> None:
        """Disconnects."""
        self.channel.close()

    def _open(self, server: Server) -> grpc.Channel:
        options = [
            (name, value) for name, value in OPTIONS if name not in OWN_OPTIONS and name != "grpc.service_config"
        ]
        options += OWN_OPTIONS.items()
        credentials = server.security.credentials()
        if credentials is None:
            return grpc.insecure_channel(server.address, options=options)
        return grpc.secure_channel(server.address, credentials, options=options)


class Conversation:
    """An Exchange stream, message by message. Leaving its block ends it."""

    def __init__(self, channel: grpc.Channel, metadata: Any, *, timeout_s: float) -> None:
        self._requests: queue.SimpleQueue[pb.ExchangeRequest | None] = queue.SimpleQueue()
        stub: Any = PolicyServiceStub(channel)
        self._call = stub.Exchange(iter(self._requests.get, None), timeout=timeout_s, metadata=metadata)

    def send(self, message: pb.ExchangeRequest | pb.StepRequest) -> None:
        """Sends a message, or a step in one."""
        if isinstance(message, pb.StepRequest):
            message = pb.ExchangeRequest(step=message)
        self._requests.put(message)

    def receive(self) -> pb.ExchangeResponse:
        """The next message. Raises grpc.RpcError, or EOFError when the stream has ended without an error."""
        for message in self._call:
            if not message.HasField("reconnect"):
                return cast(pb.ExchangeResponse, message)
        raise EOFError("the stream has ended")

    def opened(self) -> pb.OpenResponse:
        """The answer to the opening. Raises ValueError where something else comes."""
        message = self.receive()
        if not message.HasField("opened"):
            raise ValueError(f"the first message is not `opened`, but {message!r}")
        return message.opened

    def step(self, request: pb.StepRequest) -> pb.StepResponse:
        """Sends a step or read, and waits for its answer. Raises ValueError where something else comes."""
        self.send(request)
        message = self.receive()
        if not message.HasField("step"):
            raise ValueError(f"the answer to a step is not `step`, but {message!r}")
        return message.step

    def finish(self) -> list[pb.ExchangeResponse]:
        """Sends nothing more, and returns what still comes."""
        self._requests.put(None)
        return list(self._call)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._requests.put(None)
        self._call.cancel()


def u64(*ids: int) -> bytes:
    """Example ids as the wire has them."""
    return np.array(ids, "<u8").tobytes()


def u32(*counts: int) -> bytes:
    """Counts as the wire has them."""
    return np.array(counts, "<u4").tobytes()


def f32(*values: float) -> bytes:
    """Statistics as the wire has them."""
    return np.array(values, "<f4").tobytes()


def a_step(sequence: int, **fields: Any) -> pb.StepRequest:
    """A step of ids 1 and 2, unless `fields` say otherwise; a field that is None is left out."""
    given = {"example_ids": u64(1, 2), "contributions": f32(1.0, -1.0)} | fields
    return pb.StepRequest(sequence=sequence, **{name: value for name, value in given.items() if value is not None})
