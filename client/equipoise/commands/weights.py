"""The weights of a policy as a table with one line per example, in a file for dataframes or on standard output."""

import csv
import importlib
import os
import sys
from argparse import ArgumentTypeError
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from equipoise.admin import PolicyAdmin
from equipoise.errors import InvalidRequestError, ServerBugError
from equipoise.keys import ExampleKeys
from equipoise.policies import PolicyStatus

Columns: TypeAlias = Mapping[str, NDArray[Any]]
"""Lines of the table: values of equal length by column, in the order of the columns."""

Chunks: TypeAlias = Generator[tuple[int, NDArray[np.float32]], None, None]
"""Values of one column in order, with the position of the first of them."""

LINES = 1 << 16
"""Lines that are turned into text at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which lines of the table are wanted, and in which order.

    Attributes:
        sort: the column to sort by, lowest first; None: by row and id. Examples that were never scored come last.
        descending: highest first.
        limit: most lines; None: all.
        rows: rows of a trajectory; None: all of them.
        keys: the names of the examples, which then are a column; None: there is none.
    """

    sort: Literal["weight", "score"] | None = None
    descending: bool = False
    limit: int | None = None
    rows: range | None = None
    keys: ExampleKeys | None = None


class Table:
    """Reads the weights of one policy, and its scores unless it is a trajectory.

    Args:
        admin: where the policy is.
        status: the policy.
        selection: what is wanted of it.

    Raises:
        InvalidRequestError: the policy has no such rows or column.
    """

    def __init__(self, admin: PolicyAdmin, status: PolicyStatus, selection: Selection) -> None:
        spec = status.spec
        self._admin = admin
        self._policy = spec.name
        self._num_examples = spec.num_examples
        self._selection = selection
        self._rows = selection.rows
        if spec.rule == "trajectory":
            self._rows = selection.rows or range(int(spec.settings["rows"]))
            if selection.sort == "score":
                raise InvalidRequestError(field="--sort", value="score", rule="a trajectory has weights alone")
        elif selection.rows is not None:
            raise InvalidRequestError(field="--rows", value=_text(selection.rows), rule=f"rule {spec.rule} has no rows")
        if selection.keys is not None and len(selection.keys) != spec.num_examples:
            rule = f"must name the {spec.num_examples} examples of the policy"
            raise InvalidRequestError(field="--keys", value=f"{len(selection.keys)} names", rule=rule)
        self._names = None if selection.keys is None else np.array(list(selection.keys), np.object_)
        self.versions: set[int] = set()
        """Versions of the policy that were read; more than one if steps were made meanwhile."""
        self.lines = 0
        """How many lines were given out."""

    def pieces(self) -> Iterator[Columns]:
        """The table, some lines at a time."""
        pieces = self._in_order() if self._selection.sort is None else self._sorted()
        with closing(pieces):
            for piece in pieces:
                left = None if self._selection.limit is None else self._selection.limit - self.lines
                part = {name: values[:left] for name, values in piece.items()}
                self.lines += len(part["id"])
                yield part
                if self.lines == self._selection.limit:
                    return

    def _in_order(self) -> Generator[Columns, None, None]:
        for offset, columns in self._values():
            yield self._named(np.arange(offset, offset + len(columns["weight"])), columns)

    def _sorted(self) -> Generator[Columns, None, None]:
        pieces = [columns for _, columns in self._values()]
        columns = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        key = columns[self._selection.sort or "weight"]
        order = np.argsort(-key if self._selection.descending else key, kind="stable")[: self._selection.limit]
        for start in range(0, len(order), LINES):
            part = order[start : start + LINES]
            yield self._named(part, {name: values[part] for name, values in columns.items()})

    def _named(self, positions: NDArray[np.int64], columns: Columns) -> Columns:
        """The columns, with those that say what each line is about."""
        rows, ids = np.divmod(positions, self._num_examples)
        row = {} if self._rows is None else {"row": rows + self._rows.start}
        key = {} if self._names is None else {"key": self._names[ids]}
        return {**row, "id": ids, **key, **columns}

    def _values(self) -> Iterator[tuple[int, Columns]]:
        """Weights, and scores, in order; with the position of the first of them."""
        weights = self._chunks("weight", rows=self._rows)
        if self._rows is not None:
            yield from ((offset, {"weight": values}) for offset, values in weights)
            return
        with closing(weights), closing(self._chunks("score", rows=None)) as scores:
            score = np.zeros(0, np.float32)
            for offset, weight in weights:
                while len(score) < len(weight):  # the server may cut the two differently
                    score = np.concatenate([score, next(scores)[1]])
                yield offset, {"weight": weight, "score": score[: len(weight)]}
                score = score[len(weight) :]

    def _chunks(self, field: Literal["weight", "score"], *, rows: range | None) -> Chunks:
        """Position and values of each chunk, up to the last one."""
        expected = self._num_examples * (1 if rows is None else len(rows))
        arrived = 0
        for chunk in self._admin.read_chunks(self._policy, field, rows=rows):
            if chunk.offset != arrived:
                raise ServerBugError(f"the server sent values from {chunk.offset} on where {arrived} was next")
            arrived += len(chunk.values)
            self.versions.add(chunk.version)
            yield chunk.offset, chunk.values
        if arrived != expected:
            raise ServerBugError(f"the server sent {arrived} of {expected} values")


class Writer(Protocol):
    """Something that takes a table, some lines at a time."""

    def write(self, columns: Columns) -> None:
        """Takes the next lines."""

    def close(self) -> None:
        """There are no more."""


class CsvWriter:
    """Comma-separated values with a line of names; floats in the fewest digits that give the float32 back.

    A score that is not there is an empty field.
    """

    def __init__(self, file: TextIO) -> None:
        self._lines = csv.writer(file, lineterminator="\n")
        self._begun = False

    def write(self, columns: Columns) -> None:
        """Takes the next lines."""
        if not self._begun:
            self._lines.writerow(columns)
            self._begun = True
        for start in range(0, len(columns["id"]), LINES):
            texts = [_texts(values[start : start + LINES]) for values in columns.values()]
            self._lines.writerows(zip(*texts, strict=True))

    def close(self) -> None:
        """Nothing is left to write."""


class ParquetWriter:
    """Apache Parquet: ids and rows int64, weights and scores float32, a score that is not there null."""

    def __init__(self, path: Path, *, metadata: Mapping[str, str]) -> None:
        self._arrow = importlib.import_module("pyarrow")
        self._parquet = importlib.import_module("pyarrow.parquet")
        self._path = path
        self._metadata = metadata
        self._file: Any = None

    def write(self, columns: Columns) -> None:
        """Takes the next lines."""
        arrays = {name: self._arrow.array(values, from_pandas=True) for name, values in columns.items()}  # NaN: null
        table = self._arrow.table(arrays, metadata=dict(self._metadata))
        if self._file is None:
            self._file = self._parquet.ParquetWriter(self._path, table.schema)
        self._file.write_table(table)

    def close(self) -> None:
        """Writes the end of the file."""
        if self._file is not None:
            self._file.close()


def table_file(text: str) -> Path:
    """An argument that names the file to write. Raises ArgumentTypeError where it cannot be written."""
    path = Path(text)
    if path.suffix.lower() not in (".csv", ".parquet"):
        raise ArgumentTypeError(f"{text!r} must end in .csv or .parquet")
    if path.suffix.lower() == ".parquet":
        try:
            importlib.import_module("pyarrow.parquet")
        except ImportError as error:
            raise ArgumentTypeError(f"{text!r} needs pyarrow, which is not installed: pip install pyarrow") from error
    return path


def key_table(text: str) -> ExampleKeys:
    """An argument that names a table of names. Raises ArgumentTypeError where it is none."""
    try:
        return ExampleKeys.load(text)
    except (OSError, ValueError, csv.Error) as error:
        raise ArgumentTypeError(f"{text!r}: {getattr(error, 'strerror', None) or error}") from error


def row_range(text: str) -> range:
    """An argument `FIRST:END`, END not included. Raises ArgumentTypeError where it is something else."""
    first, _, end = text.partition(":")
    if first.isdecimal() and end.isdecimal() and int(first) < int(end):
        return range(int(first), int(end))
    raise ArgumentTypeError(f"{text!r} must be FIRST:END with FIRST below END, such as 0:100")


def count(text: str) -> int:
    """An argument that is a number of lines. Raises ArgumentTypeError where it is not positive."""
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise ArgumentTypeError(f"{text!r} must be a positive integer")


@contextmanager
def writer(path: Path | None, status: PolicyStatus) -> Iterator[Writer]:
    """Writes to a file, which is replaced once the new one is complete; None: CSV to standard output."""
    if path is None:
        yield CsvWriter(sys.stdout)
        return
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.suffix.lower() == ".csv":
            with part.open("x", encoding="utf-8", newline="") as file:
                yield CsvWriter(file)
        else:
            part.touch(exist_ok=False)
            parquet = ParquetWriter(part, metadata={"equipoise.policy": status.spec.name, "equipoise.uid": status.uid})
            with closing(parquet):
                yield parquet
        os.replace(part, path)
    except OSError as error:
        if error.filename == str(part):  # the caller knows the file by its own name
            error.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


def _texts(values: NDArray[Any]) -> list[str]:
    if values.dtype.kind == "O":
        return list(values.tolist())
    texts: NDArray[np.str_] = values.astype(np.str_)
    if values.dtype.kind == "f":
        texts[np.isnan(values)] = ""
    return list(texts.tolist())


def _text(rows: range) -> str:
    return f"{rows.start}:{rows.stop}"
