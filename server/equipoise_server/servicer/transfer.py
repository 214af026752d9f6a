"""Whole policies over the wire: exports and imports."""

from collections.abc import AsyncIterator

import numpy as np

from equipoise.v1 import policy_pb2 as pb
from equipoise_server.engine import Policy, PolicyRunner, PolicySpec
from equipoise_server.engine.progress import Progress
from equipoise_server.engine.snapshot import Facts, Snapshot
from equipoise_server.errors import invalid
from equipoise_server.interceptors import Malformed
from equipoise_server.rules import build
from equipoise_server.servicer import specs

CHUNK_BYTES = 1 << 20
ELEMENT_TYPES = {"torch.int32": "int32", "torch.int64": "int64", "torch.float32": "float32"}
ITEM_SIZES = {"int32": 4, "int64": 8, "float32": 4}


def snapshot(policy: Policy) -> Snapshot:
    """A copy of the whole policy."""
    return Snapshot.of(policy)


async def export_messages(runner: PolicyRunner) -> AsyncIterator[pb.ExportPolicyResponse]:
    """The header and the columns of one version."""
    copy = await runner.read(snapshot)
    spec = runner.policy.spec
    yield pb.ExportPolicyResponse(
        header=pb.StateHeader(
            spec=specs.spec_message(spec),
            version=copy.facts.progress.version,
            scalars=copy.facts.scalars,
            columns=element_types(spec),
        )
    )
    for column, data in copy.columns.items():
        step = CHUNK_BYTES - CHUNK_BYTES % copy.item_sizes[column]
        for start in range(0, len(data), step):
            offset = start // copy.item_sizes[column]
            chunk = pb.StateChunk(column=column, offset=offset, data=data[start : start + step])
            yield pb.ExportPolicyResponse(chunk=chunk)


def element_types(spec: PolicySpec) -> dict[str, str]:
    """Element types of a policy's columns by their names."""
    return {name: ELEMENT_TYPES[str(dtype)] for name, dtype in build(spec.rule, spec.settings).columns.items()}


async def import_snapshot(requests: AsyncIterator[object], *, max_examples: int) -> tuple[PolicySpec, Snapshot]:
    """What a client imports, checked. Raises ServiceError (INVALID_STATE)."""
    spec: PolicySpec | None = None
    header = pb.StateHeader()
    received: dict[str, bytearray] = {}
    async for message in requests:
        if isinstance(message, Malformed):
            raise message.error()
        assert isinstance(message, pb.ImportPolicyRequest)
        if spec is None:
            if message.WhichOneof("message") != "header":
                raise invalid("INVALID_STATE", "message", "the first message must be the header")
            header = message.header
            spec = specs.resolve_spec(header.spec, max_examples=max_examples)
            _check_columns(header, spec)
            received = {name: bytearray() for name in header.columns}
        else:
            _receive(message, received, header, spec)
    if spec is None:
        raise invalid("INVALID_STATE", "message", "the stream ended before the header")
    return spec, _to_snapshot(spec, header, received)


def _check_columns(header: pb.StateHeader, spec: PolicySpec) -> None:
    expected = element_types(spec)
    if dict(header.columns) != expected:
        description = f"{dict(header.columns)}, but rule {spec.rule!r} keeps {expected}"
        raise invalid("INVALID_STATE", "header.columns", description)
    for name, value in header.scalars.items():
        if not np.isfinite(value):
            raise invalid("INVALID_STATE", f"header.scalars.{name}", f"{value} is not finite")


def _receive(
    message: pb.ImportPolicyRequest, received: dict[str, bytearray], header: pb.StateHeader, spec: PolicySpec
) -> None:
    if message.WhichOneof("message") != "chunk":
        raise invalid("INVALID_STATE", "message", "after the header, every message must be a chunk")
    chunk = message.chunk
    column = received.get(chunk.column)
    if column is None:
        raise invalid("INVALID_STATE", "chunk.column", f"{chunk.column!r} is not in the header's columns")
    size = ITEM_SIZES[header.columns[chunk.column]]
    if chunk.offset * size != len(column):
        description = f"{chunk.offset}, but column {chunk.column!r} continues at {len(column) // size}; send in order"
        raise invalid("INVALID_STATE", "chunk.offset", description)
    if len(column) + len(chunk.data) > spec.num_examples * size:
        raise invalid("INVALID_STATE", "chunk.data", f"column {chunk.column!r} is longer than num_examples")
    column.extend(chunk.data)


def _to_snapshot(spec: PolicySpec, header: pb.StateHeader, received: dict[str, bytearray]) -> Snapshot:
    sizes = {name: ITEM_SIZES[kind] for name, kind in header.columns.items()}
    for name, data in received.items():
        if len(data) != spec.num_examples * sizes[name]:
            description = f"column {name!r} has {len(data) // sizes[name]} of {spec.num_examples} examples"
            raise invalid("INVALID_STATE", "chunk", description)
    facts = Facts(progress=Progress(), trainers="{}", scalars=dict(header.scalars), guard_strength=0.0)
    return Snapshot(
        facts=facts,
        columns={name: bytes(data) for name, data in received.items()},
        item_sizes=sizes,
        num_examples=spec.num_examples,
    )
