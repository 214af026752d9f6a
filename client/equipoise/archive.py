"""A policy's whole state as a value, and as a file: export, import, look inside with NumPy."""

import json
import os
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import json_format
from numpy.typing import NDArray

from equipoise import errors
from equipoise.v1 import policy_pb2 as pb

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
        """Puts an export together, see `ArchiveReader`."""
        reader = ArchiveReader()
        for message in messages:
            reader.add(message)
        return reader.archive()

    def messages(self, name: str) -> "Messages":
        """What creates the policy `name` with this state."""
        return Messages(self, name)

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


class ArchiveReader:
    """Puts the messages of an export together."""

    def __init__(self) -> None:
        self._header: pb.StateHeader | None = None
        self._columns: dict[str, NDArray[Any]] = {}
        self._arrived: dict[str, int] = {}

    def add(self, message: pb.ExportPolicyResponse) -> None:
        """Takes the next message.

        Raises:
            ServerBugError: it does not follow the one before.
        """
        if self._header is None:
            if not message.HasField("header"):
                raise errors.ServerBugError("the export does not start with a header")
            self._header = message.header
            for name, kind in self._header.columns.items():
                self._columns[name] = np.zeros(self._length(name), np.dtype(kind).newbyteorder("<"))
                self._arrived[name] = 0
            return
        chunk = message.chunk
        if chunk.column not in self._columns or chunk.offset != self._arrived[chunk.column]:
            raise errors.ServerBugError(f"the export has a piece of {chunk.column!r} where none belongs")
        values = np.frombuffer(chunk.data, self._columns[chunk.column].dtype)
        self._columns[chunk.column][chunk.offset : chunk.offset + len(values)] = values
        self._arrived[chunk.column] += len(values)

    def archive(self) -> PolicyArchive:
        """The state.

        Raises:
            ServerBugError: something of it is missing.
        """
        if self._header is None:
            raise errors.ServerBugError("the export is empty")
        for name, count in self._arrived.items():
            if count != self._length(name):
                raise errors.ServerBugError(f"the export has {count} of {self._length(name)} values of {name!r}")
        header = self._header
        return PolicyArchive(
            spec=header.spec, version=header.version, scalars=dict(header.scalars), columns=self._columns
        )

    def _length(self, name: str) -> int:
        assert self._header is not None
        return self._header.lengths.get(name, self._header.spec.num_examples)


class Messages:
    """What creates a policy with the state of an archive; may be gone through again."""

    def __init__(self, archive: PolicyArchive, name: str) -> None:
        self._archive = archive
        self._name = name

    def __iter__(self) -> Iterator[pb.ImportPolicyRequest]:
        archive = self._archive
        spec = pb.PolicySpec()
        spec.CopyFrom(archive.spec)
        spec.name = self._name
        kinds = {column: values.dtype.name for column, values in archive.columns.items()}
        lengths = {column: len(values) for column, values in archive.columns.items()}
        yield pb.ImportPolicyRequest(
            header=pb.StateHeader(
                spec=spec, version=archive.version, scalars=archive.scalars, columns=kinds, lengths=lengths
            )
        )
        for column, values in archive.columns.items():
            piece = CHUNK_BYTES // values.itemsize
            for offset in range(0, len(values), piece):
                data = np.ascontiguousarray(values[offset : offset + piece], values.dtype.newbyteorder("<")).tobytes()
                yield pb.ImportPolicyRequest(chunk=pb.StateChunk(column=column, offset=offset, data=data))
