"""Calls beside the training loop, as values: what is sent, how the answer is read, and who is asked.

The sync and the asyncio client carry them out; all that they have in common is here.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Generic, Literal, TypeAlias, TypeVar

import grpc
import numpy as np
from numpy.typing import ArrayLike, NDArray

from equipoise import errors, wire
from equipoise.channel import Server
from equipoise.errors import ServerBugError, is_integer, require
from equipoise.policies import ListedPolicy, PolicySpec, PolicyStatus, ServerInfo, check_name
from equipoise.route import Route
from equipoise.v1 import policy_pb2 as pb

Field: TypeAlias = Literal["weight", "score", "loss", "stratum"]
"""What can be read of every example: the served weight, or the rule's own statistic."""

T = TypeVar("T")

PAGE_SIZE = 1000
"""Policies per page of a listing: the most a server gives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[T]):
    """One call.

    Attributes:
        method: name of the RPC.
        policy: the policy it is about; empty: none.
        request: what is sent: a message; for a call that uploads, messages that may be gone through again.
        parse: reads the answer; for a call that streams, one message of it.
        streams: whether the answer comes as a stream of messages.
        uploads: whether the request goes as a stream of messages.
    """

    method: str
    policy: str = ""
    request: Any
    parse: Callable[[Any], T]
    streams: bool = False
    uploads: bool = False


PAUSES = (0.1, 0.2, 0.4, 0.8)
"""Waits between the attempts of a call, seconds: in all longer than a channel waits between two attempts to connect."""


class Attempts(Generic[T]):
    """One call, made at one server after another, until it succeeds or another attempt is not worth it.

    Every server is asked once; then, with pauses, the server of now.

    Iterating gives the server to ask. Then come `begin`, `read` for each message, and `fail` if it fails; `end` always.

    Args:
        call: the call.
        route: the servers.
        timeout: deadline of each attempt, seconds; what streams, either way, has none.
    """

    def __init__(self, call: Call[T], route: Route, *, timeout: float) -> None:
        self._call = call
        self._route = route
        fits = isinstance(timeout, Real) and timeout > 0
        require(fits, field="timeout", value=timeout, rule="must be a positive number of seconds")
        self._timeout = None if call.streams or call.uploads else timeout
        self._server = route.server
        self._left = route.attempts
        self._pauses = iter(PAUSES)
        self._has_read = False
        self._answer: Any = None

    def __iter__(self) -> Iterator[Server]:
        while True:
            self._server = self._route.server
            yield self._server

    def begin(self, stub: Any) -> Any:
        """Makes the call: what gRPC gives for it."""
        method = getattr(stub, self._call.method)
        metadata = self._route.headers(self._server, self._call.policy)
        request = iter(self._call.request) if self._call.uploads else self._call.request
        self._answer = method(request, timeout=self._timeout, metadata=metadata)
        return self._answer

    def read(self, message: Any) -> T:
        """A message of the answer, parsed."""
        self._has_read = True
        return self._call.parse(message)

    def fail(self, failure: grpc.RpcError) -> float:
        """Turns to the next server; how long to wait before it is asked, seconds.

        Raises:
            EquipoiseError: why the call failed, where another attempt is not worth it.
        """
        self._left -= 1
        error = errors.from_rpc(failure, address=self._server.address)
        turned = self._route.turn(error, asked=self._server, answered=self._has_read)
        if self._has_read or not self._route.repeats(error, method=self._call.method):
            raise error from failure
        if turned and self._left > 0:
            return 0.0
        pause = next(self._pauses, None)
        if pause is None:
            raise error from failure
        return max(pause, error.retry_after or 0.0)

    def end(self) -> None:
        """Lets go of an answer that is not read to its end."""
        if self._call.streams and self._answer is not None:
            self._answer.cancel()


def create(spec: PolicySpec, *, fork_of: str = "") -> Call[PolicyStatus]:
    """Creates a policy."""
    check_name(spec.name)
    request = pb.CreatePolicyRequest(policy=spec.to_proto())
    setattr(request, "from", fork_of)  # a keyword of Python
    return Call(method="CreatePolicy", policy=spec.name, request=request, parse=_status)


def fork(source: str, name: str) -> Call[PolicyStatus]:
    """Creates a policy with the state of another."""
    return create(PolicySpec(name=name, num_examples=0), fork_of=source)


def get(policy: str) -> Call[PolicyStatus]:
    """Status of a policy."""
    return Call(method="GetPolicy", policy=policy, request=pb.GetPolicyRequest(policy=policy), parse=_status)


def delete(policy: str, *, uid: str = "") -> Call[str]:
    """Deletes a policy; the answer is its uid."""
    request = pb.DeletePolicyRequest(policy=policy, uid=uid)
    return Call(method="DeletePolicy", policy=policy, request=request, parse=lambda answer: str(answer.uid))


def list_page(prefix: str, token: str) -> Call[tuple[list[ListedPolicy], str]]:
    """A page of policies, and the token of the next; empty: there is none."""
    request = pb.ListPoliciesRequest(prefix=prefix, page_token=token, page_size=PAGE_SIZE)
    return Call(method="ListPolicies", request=request, parse=_page)


def watch(policy: str, *, min_interval: float) -> Call[PolicyStatus]:
    """Status of a policy whenever it changes; streams."""
    fits = isinstance(min_interval, Real) and 0 <= min_interval < 1 << 20
    require(fits, field="min_interval", value=min_interval, rule="must be a number of seconds in [0, 2^20)")
    request = pb.WatchPolicyRequest(policy=policy, min_interval_ms=round(min_interval * 1000))
    return Call(method="WatchPolicy", policy=policy, request=request, parse=_status, streams=True)


def server_info() -> Call[ServerInfo]:
    """The server."""
    return Call(method="GetServerInfo", request=pb.GetServerInfoRequest(), parse=ServerInfo.from_proto)


def sample(policy: str, count: int, *, with_replacement: bool, seed: int | None) -> Call[NDArray[np.uint64]]:
    """Ids drawn by weight."""
    require(is_integer(count, 1, 1 << 32), field="count", value=count, rule="must be an integer in [1, 2^32)")
    fits = seed is None or is_integer(seed, 0, 1 << 64)
    require(fits, field="seed", value=seed, rule="must be an integer in [0, 2^64)")
    request = pb.SampleExamplesRequest(policy=policy, count=count, with_replacement=with_replacement, seed=seed)
    return Call(
        method="SampleExamples", policy=policy, request=request, parse=lambda answer: wire.uint64s(answer.example_ids)
    )


def read_values(policy: str, field: Field, ids: ArrayLike | None, rows: range | None = None) -> Call["ValuesChunk"]:
    """Weights or scores, or the weights of rows of a trajectory; streams."""
    fields: Mapping[str, pb.Field.ValueType] = {
        "weight": pb.FIELD_WEIGHT,
        "score": pb.FIELD_SCORE,
        "loss": pb.FIELD_LOSS,
        "stratum": pb.FIELD_STRATUM,
    }
    require(field in fields, field="field", value=field, rule="must be 'weight', 'score', 'loss' or 'stratum'")
    request = pb.ReadWeightsRequest(policy=policy, field=fields[field])
    if ids is not None:
        request.example_ids = wire.example_ids("ids", ids, wire.Bounds()).tobytes()
    if rows is not None:
        fits = isinstance(rows, range) and rows.step == 1 and 0 <= rows.start < rows.stop < 1 << 63
        require(fits, field="rows", value=rows, rule="must be a range with step 1 that is not empty")
        request.first_row, request.num_rows = rows.start, len(rows)
    return Call(method="ReadWeights", policy=policy, request=request, parse=_chunk, streams=True)


def export_state(policy: str) -> Call[pb.ExportPolicyResponse]:
    """The whole state of a policy; streams."""
    request = pb.ExportPolicyRequest(policy=policy)
    return Call(method="ExportPolicy", policy=policy, request=request, parse=_itself, streams=True)


def import_state(name: str, messages: Iterable[pb.ImportPolicyRequest]) -> Call[PolicyStatus]:
    """Creates a policy with the state of messages, which may be gone through again."""
    return Call(method="ImportPolicy", policy=name, request=messages, parse=_status, uploads=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ValuesChunk:
    """A piece of what was read.

    Attributes:
        offset: position of the first value in the whole.
        values: float32, one per example.
        version: version of the policy that they belong to.
    """

    offset: int
    values: NDArray[np.float32]
    version: int


class Values:
    """Puts the chunks of a read together; `rows`: those of a trajectory that were asked for."""

    def __init__(self, rows: range | None = None) -> None:
        self._rows = rows
        self._chunks: list[NDArray[np.float32]] = []
        self._length = 0

    def add(self, chunk: ValuesChunk) -> None:
        """Takes the next chunk.

        Raises:
            ServerBugError: it does not follow the one before.
        """
        if chunk.offset != self._length:
            raise ServerBugError(f"the server sent values from {chunk.offset} on where {self._length} was next")
        self._chunks.append(chunk.values)
        self._length += len(chunk.values)

    def array(self) -> NDArray[np.float32]:
        """All values, float32: one per example, or [rows, examples]."""
        values = np.concatenate(self._chunks) if self._chunks else np.zeros(0, np.float32)
        return values if self._rows is None else values.reshape(len(self._rows), -1)


def _status(answer: Any) -> PolicyStatus:
    return PolicyStatus.from_proto(answer.status)


def _itself(answer: pb.ExportPolicyResponse) -> pb.ExportPolicyResponse:
    return answer


def _page(answer: pb.ListPoliciesResponse) -> tuple[list[ListedPolicy], str]:
    return [ListedPolicy.from_proto(policy) for policy in answer.policies], answer.next_page_token


def _chunk(answer: pb.ReadWeightsResponse) -> ValuesChunk:
    return ValuesChunk(offset=answer.offset, values=wire.float32s(answer.values), version=answer.version)
