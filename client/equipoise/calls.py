"""Calls beside the training loop, as values: what is sent and how the answer is read. Both clients carry them out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from equipoise import wire
from equipoise.errors import InvalidRequestError, ServerBugError
from equipoise.policies import ListedPolicy, PolicySpec, PolicyStatus, ServerInfo, check_name
from equipoise.v1 import policy_pb2 as pb

Field: TypeAlias = Literal["weight", "score"]
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
        request: what is sent.
        parse: reads the answer; for RPCs that stream, one message of it.
    """

    method: str
    policy: str = ""
    request: Any
    parse: Callable[[Any], T]


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
    request = pb.WatchPolicyRequest(policy=policy, min_interval_ms=round(min_interval * 1000))
    return Call(method="WatchPolicy", policy=policy, request=request, parse=_status)


def server_info() -> Call[ServerInfo]:
    """The server."""
    return Call(method="GetServerInfo", request=pb.GetServerInfoRequest(), parse=ServerInfo.from_proto)


def sample(policy: str, count: int, *, with_replacement: bool, seed: int | None) -> Call[NDArray[np.uint64]]:
    """Ids drawn by weight."""
    if not 0 < count < 2**32:
        raise InvalidRequestError(field="count", value=count, rule="must be from 1 to 2**32 - 1")
    if seed is not None and not 0 <= seed < 2**64:
        raise InvalidRequestError(field="seed", value=seed, rule="must be from 0 to 2**64 - 1")
    request = pb.SampleExamplesRequest(policy=policy, count=count, with_replacement=with_replacement, seed=seed)
    return Call(
        method="SampleExamples", policy=policy, request=request, parse=lambda answer: wire.uint64s(answer.example_ids)
    )


def read_values(policy: str, field: Field, ids: ArrayLike | None, rows: range | None = None) -> Call["ValuesChunk"]:
    """Weights or scores, or the weights of rows of a trajectory; streams."""
    fields: Mapping[str, pb.Field.ValueType] = {"weight": pb.FIELD_WEIGHT, "score": pb.FIELD_SCORE}
    if field not in fields:
        raise InvalidRequestError(field="field", value=field, rule="must be 'weight' or 'score'")
    request = pb.ReadWeightsRequest(policy=policy, field=fields[field])
    if ids is not None:
        request.example_ids = wire.example_ids("ids", ids, wire.Bounds()).tobytes()
    if rows is not None:
        if rows.step != 1 or not 0 <= rows.start < rows.stop:
            raise InvalidRequestError(field="rows", value=rows, rule="must be a range of rows, step 1, not empty")
        request.first_row, request.num_rows = rows.start, len(rows)
    return Call(method="ReadWeights", policy=policy, request=request, parse=_chunk)


@dataclass(frozen=True, slots=True, kw_only=True)
class ValuesChunk:
    """A piece of what was read: values [offset, offset + len(values))."""

    offset: int
    values: NDArray[np.float32]


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


def _page(answer: pb.ListPoliciesResponse) -> tuple[list[ListedPolicy], str]:
    return [ListedPolicy.from_proto(policy) for policy in answer.policies], answer.next_page_token


def _chunk(answer: pb.ReadWeightsResponse) -> ValuesChunk:
    return ValuesChunk(offset=answer.offset, values=wire.float32s(answer.values))
