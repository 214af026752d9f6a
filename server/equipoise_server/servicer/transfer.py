"""Whole policies over the wire: exports and imports."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass

import numpy as np

from equipoise.v1 import policy_pb2 as pb
from equipoise_server.engine import Header, PolicyRunner, PolicySpec, tables
from equipoise_server.engine.progress import Progress
from equipoise_server.errors import Code, ServiceError, invalid, quoted
from equipoise_server.rules import Guard, Scalars, TableState
from equipoise_server.servicer import specs
from equipoise_server.servicer.limits import ServiceLimits
from equipoise_server.store import Page

CHUNK_BYTES = 1 << 20
GUARD = "guard."
"""Before the names of the guard's scalars, which travel with the rule's."""
ELEMENT_TYPES = {"torch.int32": "int32", "torch.int64": "int64", "torch.float32": "float32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedPolicy:
    """What a client imports.

    Attributes:
        spec: its specification.
        header: what belongs to no page, at version 0.
        outline: tables of its shapes, without memory.
        columns: little-endian bytes of each table, by name.
    """

    spec: PolicySpec
    header: Header
    outline: TableState
    columns: Mapping[str, bytearray]

    def pages(self) -> Iterator[tuple[int, Page]]:
        """Its pages, as the store takes them; none of a policy without tables."""
        row_bytes = {name: tables.row_bytes(column) for name, column in self.outline.columns.items()}
        for index in range(self.outline.num_pages):
            start, stop = tables.page_bounds(self.outline, index)
            rows = {name: slice(start * size, stop * size) for name, size in row_bytes.items()}
            columns = {name: bytes(data[rows[name]]) for name, data in self.columns.items()}
            yield index, Page(version=0, columns=columns)


async def export_messages(runner: PolicyRunner) -> AsyncGenerator[pb.ExportPolicyResponse, None]:
    """The header and the columns of one version, page after page; steps go on meanwhile."""
    async with runner.snapshot() as snapshot, aclosing(runner.pages(snapshot, version=0)) as pages:
        spec, version = runner.policy.spec, snapshot.header.version
        outline = spec.outline()
        yield pb.ExportPolicyResponse(
            header=pb.StateHeader(
                spec=specs.spec_message(spec),
                version=version,
                scalars=_all_scalars(snapshot.header),
                columns=element_types(outline),
                lengths=lengths(outline),
            )
        )
        sent = dict.fromkeys(outline.columns, 0)
        async for _, page in pages:
            for column, data in page.columns.items():
                size = outline.columns[column].element_size()
                step = CHUNK_BYTES - CHUNK_BYTES % size
                for start in range(0, len(data), step):
                    piece = data[start : start + step]
                    chunk = pb.StateChunk(column=column, offset=sent[column], data=piece)
                    yield pb.ExportPolicyResponse(chunk=chunk)
                    sent[column] += len(piece) // size


def element_types(outline: TableState) -> dict[str, str]:
    """Element types of a policy's columns by their names."""
    return {name: ELEMENT_TYPES[str(column.dtype)] for name, column in outline.columns.items()}


def lengths(outline: TableState) -> dict[str, int]:
    """Numbers of values of a policy's columns by their names."""
    return {name: column.numel() for name, column in outline.columns.items()}


class Import:
    """A policy on its way in: its header first, so that whoever may not store it sends nothing more.

    Args:
        requests: the stream.
        limits: bounds of the service.
    """

    def __init__(self, requests: AsyncIterator[pb.ImportPolicyRequest], *, limits: ServiceLimits) -> None:
        self._requests = requests
        self._limits = limits
        self._header = pb.StateHeader()
        self._outline = TableState(num_examples=0, columns={})

    async def read_header(self, *, admit: Callable[[str], None]) -> PolicySpec:
        """The specification, checked; `admit` is called with the policy's name before anything else is looked at.

        Raises ServiceError: INVALID_STATE, those of a specification, and what `admit` raises.
        """
        async for request in self._requests:
            if request.WhichOneof("message") != "header":
                raise invalid("INVALID_STATE", "message", "the first message must be the header")
            self._header = request.header
            admit(request.header.spec.name)
            self._spec = specs.resolve_spec(request.header.spec, limits=self._limits)
            self._outline = self._spec.outline()
            _check_columns(request.header, self._spec, self._outline)
            return self._spec
        raise invalid("INVALID_STATE", "message", "the stream ended before the header")

    @property
    def num_bytes(self) -> int:
        """Bytes of the columns that are to come."""
        return self._outline.nbytes

    async def read_columns(self) -> ImportedPolicy:
        """The whole policy, checked but for its values. Raises ServiceError (INVALID_STATE)."""
        received = {name: bytearray() for name in self._header.columns}
        async for request in self._requests:
            _receive(request, received, self._outline)
        return _imported(self._spec, self._outline, self._header, received)


class ImportMemory:
    """The memory of all imports under way; an import that is larger than all of it may come alone.

    Args:
        max_bytes: of their columns together.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.taken = 0
        """Bytes that are held now."""

    @contextmanager
    def holding(self, num_bytes: int) -> Iterator[None]:
        """Surrounds an import of so many bytes. Raises ServiceError (TOO_MANY_IMPORTS)."""
        if self.taken and self.taken + num_bytes > self._max_bytes:
            message = (
                f"{num_bytes} bytes more than the {self.taken} that are being imported would exceed the server's limit"
                f" max_import_bytes, {self._max_bytes}"
            )
            raise ServiceError(Code.RESOURCE_EXHAUSTED, "TOO_MANY_IMPORTS", message, retry_after_s=1.0)
        self.taken += num_bytes
        try:
            yield
        finally:
            self.taken -= num_bytes


def _check_columns(header: pb.StateHeader, spec: PolicySpec, outline: TableState) -> None:
    expected = element_types(outline)
    if dict(header.columns) != expected:
        description = f"{dict(header.columns)}, but rule {spec.rule!r} keeps {expected}"
        raise invalid("INVALID_STATE", "header.columns", description)
    for name, length in lengths(outline).items():
        given = header.lengths.get(name, spec.num_examples)
        if given != length:
            description = f"{given} values, but rule {spec.rule!r} with these settings keeps {length}"
            raise invalid("INVALID_STATE", f"header.lengths.{name}", description)
    for name, value in header.scalars.items():
        if not np.isfinite(value):
            raise invalid("INVALID_STATE", f"header.scalars.{name}", f"{value} is not finite")


def _receive(message: pb.ImportPolicyRequest, received: dict[str, bytearray], outline: TableState) -> None:
    if message.WhichOneof("message") != "chunk":
        raise invalid("INVALID_STATE", "message", "after the header, every message must be a chunk")
    chunk = message.chunk
    column = received.get(chunk.column)
    if column is None:
        raise invalid("INVALID_STATE", "chunk.column", f"{quoted(chunk.column)} is not in the header's columns")
    expected = outline.columns[chunk.column]
    size = expected.element_size()
    if chunk.offset * size != len(column):
        description = f"{chunk.offset}, but column {chunk.column!r} continues at {len(column) // size}; send in order"
        raise invalid("INVALID_STATE", "chunk.offset", description)
    if len(column) + len(chunk.data) > expected.nbytes:
        raise invalid(
            "INVALID_STATE", "chunk.data", f"column {chunk.column!r} is longer than {expected.numel()} values"
        )
    column.extend(chunk.data)


def _imported(
    spec: PolicySpec, outline: TableState, header: pb.StateHeader, received: dict[str, bytearray]
) -> ImportedPolicy:
    for name, data in received.items():
        expected = outline.columns[name]
        if len(data) != expected.nbytes:
            description = f"column {name!r} has {len(data) // expected.element_size()} of {expected.numel()} values"
            raise invalid("INVALID_STATE", "chunk", description)
    scalars, guard = _split_scalars(header.scalars)
    return ImportedPolicy(
        spec=spec,
        header=Header(progress=Progress(), trainers="{}", scalars=scalars, guard=guard),
        outline=outline,
        columns=received,
    )


def _all_scalars(header: Header) -> dict[str, float]:
    return header.scalars | {GUARD + name: value for name, value in header.guard.to_scalars().items()}


def _split_scalars(scalars: Mapping[str, float]) -> tuple[Scalars, Guard]:
    """The rule's scalars and the guard; a new one where there is none. Raises ServiceError (INVALID_STATE)."""
    guard = {name.removeprefix(GUARD): value for name, value in scalars.items() if name.startswith(GUARD)}
    rest = {name: value for name, value in scalars.items() if not name.startswith(GUARD)}
    try:
        return rest, Guard.from_scalars(guard) if guard else Guard()
    except ValueError as error:
        raise invalid("INVALID_STATE", "header.scalars", str(error)) from error
