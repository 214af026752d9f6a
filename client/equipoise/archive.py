"""A policy's whole state as a value, and as a file: export, import, look inside with NumPy."""

import json
import os
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.protobuf import json_format
from numpy.typing import NDArray

from equipoise import errors
from equipoise.channel import Server
from equipoise.policies import PolicyStatus
from equipoise.v1 import policy_pb2 as pb
from equipoise.v1.policy_pb2_grpc import PolicyServiceStub

FORMAT = "equipoise policy 1"
CHUNK_BYTES = 1 << 20
"""Bytes of one message of an import: far below every server's largest message, far above the cost of a message."""

_COLUMN, _SCALAR = "columns/", "scalars/"


class ArchiveError(ValueError):
    """A file that is no exported policy; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyArchive:
    """The state of a policy as of one version.

    Attributes:
        spec: what the policy is, as in the contract.
        version: steps it had seen.
        scalars: the rule's scalars by name, float64, and the guard's as `guard.<name>`.
        columns: tables by name, int32, int64 or float32; each [N], those of a trajectory row after row.
    """

    spec: pb.PolicySpec
    version: int
    scalars: Mapping[str, float]
    columns: Mapping[str, NDArray[Any]]

    @classmethod
    def from_messages(cls, messages: Iterable[pb.ExportPolicyResponse]) -> "PolicyArchive":
        """Puts an export together.

        Raises:
            ServerBugError: the pieces do not fit.
        """
        stream = iter(messages)
        first = next(stream, None)
        if first is None or not first.HasField("header"):
            raise errors.ServerBugError("the export does not start with a header")
        header = first.header
        lengths = {name: header.lengths.get(name, header.spec.num_examples) for name in header.columns}
        columns = {
            name: np.zeros(lengths[name], np.dtype(kind).newbyteorder("<")) for name, kind in header.columns.items()
        }
        arrived = dict.fromkeys(columns, 0)
        for message in stream:
            chunk = message.chunk
            if chunk.column not in columns or chunk.offset != arrived[chunk.column]:
                raise errors.ServerBugError(f"the export has a piece of {chunk.column!r} where none belongs")
            values = np.frombuffer(chunk.data, columns[chunk.column].dtype)
            columns[chunk.column][chunk.offset : chunk.offset + len(values)] = values
            arrived[chunk.column] += len(values)
        for name, count in arrived.items():
            if count != lengths[name]:
                raise errors.ServerBugError(f"the export has {count} of {lengths[name]} values of {name!r}")
        return cls(spec=header.spec, version=header.version, scalars=dict(header.scalars), columns=columns)

    def messages(self, name: str) -> Iterator[pb.ImportPolicyRequest]:
        """What creates the policy `name` with this state."""
        spec = pb.PolicySpec()
        spec.CopyFrom(self.spec)
        spec.name = name
        kinds = {column: values.dtype.name for column, values in self.columns.items()}
        lengths = {column: len(values) for column, values in self.columns.items()}
        header = pb.StateHeader(spec=spec, version=self.version, scalars=self.scalars, columns=kinds, lengths=lengths)
        yield pb.ImportPolicyRequest(header=header)
        for column, values in self.columns.items():
            piece = CHUNK_BYTES // values.itemsize
            for offset in range(0, len(values), piece):
                data = np.ascontiguousarray(values[offset : offset + piece], values.dtype.newbyteorder("<")).tobytes()
                yield pb.ImportPolicyRequest(chunk=pb.StateChunk(column=column, offset=offset, data=data))

    def save(self, path: Path) -> None:
        """Writes a .npz file; a file of this name is replaced only once the new one is complete."""
        arrays: dict[str, NDArray[Any]] = {
            "format": np.array(FORMAT),
            "spec": np.array(json.dumps(json_format.MessageToDict(self.spec))),
            "version": np.array(self.version, np.int64),
        }
        arrays |= {_SCALAR + name: np.array(value, np.float64) for name, value in self.scalars.items()}
        arrays |= {_COLUMN + name: values for name, values in self.columns.items()}
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                np.savez(file, allow_pickle=False, **arrays)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise

    @classmethod
    def load(cls, path: Path) -> "PolicyArchive":
        """Reads a file that `save` wrote.

        Raises:
            OSError: it cannot be read.
            ArchiveError: it is something else.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                if str(file["format"]) != FORMAT:
                    raise ArchiveError(f"{path}: format {str(file['format'])!r} is not {FORMAT!r}")
                return cls(
                    spec=json_format.ParseDict(json.loads(str(file["spec"])), pb.PolicySpec()),
                    version=int(file["version"]),
                    scalars={name.removeprefix(_SCALAR): float(file[name]) for name in file if _SCALAR in name},
                    columns={name.removeprefix(_COLUMN): file[name] for name in file if _COLUMN in name},
                )
        except (KeyError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, json_format.ParseError) as error:
            if isinstance(error, ArchiveError):
                raise
            raise ArchiveError(f"{path} is no exported policy: {error}") from error


def export_policy(server: Server, policy: str, *, timeout: float | None = None) -> PolicyArchive:
    """Fetches the whole state of a policy.

    Raises:
        PolicyNotFoundError: there is none of this name.
    """
    with server.channel() as channel:
        stub: Any = PolicyServiceStub(channel)
        request = pb.ExportPolicyRequest(policy=policy)
        metadata = server.headers(policy)
        try:
            return PolicyArchive.from_messages(stub.ExportPolicy(request, timeout=timeout, metadata=metadata))
        except grpc.RpcError as failure:
            raise errors.from_rpc(failure, address=server.address) from failure


def import_policy(server: Server, archive: PolicyArchive, name: str, *, timeout: float | None = None) -> PolicyStatus:
    """Creates the policy `name` with the state of the archive.

    Raises:
        PolicyExistsError: there is one of this name.
    """
    with server.channel() as channel:
        stub: Any = PolicyServiceStub(channel)
        try:
            answer = stub.ImportPolicy(archive.messages(name), timeout=timeout, metadata=server.headers(name))
        except grpc.RpcError as failure:
            raise errors.from_rpc(failure, address=server.address) from failure
        return PolicyStatus.from_proto(answer.status)
