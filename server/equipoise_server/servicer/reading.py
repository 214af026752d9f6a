"""What ReadWeights reads, in pieces of bounded size: one value per example, or rows of a trajectory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from equipoise.v1 import policy_pb2 as pb
from equipoise_server.engine import Policy
from equipoise_server.errors import invalid
from equipoise_server.servicer.arrays import parse_ids, to_bytes
from equipoise_server.servicer.limits import ServiceLimits

PIECE_VALUES = 262_144
"""Values per piece: 1 MiB; a longer row is one piece."""

KEPT: dict[int, str] = {pb.FIELD_LOSS: "loss", pb.FIELD_STRATUM: "stratum"}
"""What some rules keep beside scores, by field."""

Reader: TypeAlias = Callable[[Policy], tuple[int, bytes]]
"""Reads a piece on the device: version and little-endian values."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece: position of its first value in what was asked for, and how to read it."""

    offset: int
    read: Reader


def pieces(request: pb.ReadWeightsRequest, policy: Policy, *, limits: ServiceLimits) -> Iterator[Piece]:
    """The pieces of what a request asks for, in order.

    Raises ServiceError (INVALID_FIELD, OUT_OF_RANGE_VALUE, ID_OUT_OF_RANGE, ...) at the first one.
    """
    _check_field(request, policy)
    ids = None
    if request.HasField("example_ids"):
        num_examples, most = policy.spec.num_examples, limits.max_batch_examples
        ids = parse_ids(request.example_ids, field="example_ids", num_examples=num_examples, most=most)
    if request.first_row or request.num_rows:
        _check_rows(request, policy)
        yield from _rows(request, ids, width=policy.spec.num_examples if ids is None else len(ids))
    else:
        yield from _examples(ids, total=policy.spec.num_examples if ids is None else len(ids), field=request.field)


def _examples(ids: NDArray[np.int64] | None, *, total: int, field: int) -> Iterator[Piece]:
    for start in range(0, total, PIECE_VALUES):
        stop = min(start + PIECE_VALUES, total)
        part = np.arange(start, stop, dtype=np.int64) if ids is None else ids[start:stop]
        yield Piece(start, _example_reader(None if ids is None and total == stop - start else part, field=field))


def _example_reader(ids: NDArray[np.int64] | None, *, field: int) -> Reader:
    def read(policy: Policy) -> tuple[int, bytes]:
        if field in KEPT:
            values = policy.rule.read_kept(policy.state, KEPT[field], ids)
        else:
            values = policy.rule.scores(policy.state, ids) if field == pb.FIELD_SCORE else policy.weights(ids)
        return policy.version, to_bytes(values)

    return read


def _rows(request: pb.ReadWeightsRequest, ids: NDArray[np.int64] | None, *, width: int) -> Iterator[Piece]:
    step = max(1, PIECE_VALUES // max(width, 1))
    end = request.first_row + request.num_rows
    for first in range(request.first_row, end, step):
        rows = slice(first, min(first + step, end))
        yield Piece((first - request.first_row) * width, _row_reader(rows, ids))


def _row_reader(rows: slice, ids: NDArray[np.int64] | None) -> Reader:
    def read(policy: Policy) -> tuple[int, bytes]:
        return policy.version, to_bytes(policy.rule.trajectory_weights(policy.state, rows, ids))

    return read


def _check_field(request: pb.ReadWeightsRequest, policy: Policy) -> None:
    if request.field in KEPT:
        if KEPT[request.field] not in policy.rule.kept:
            name, rule = pb.Field.Name(request.field), policy.spec.rule
            raise invalid("INVALID_FIELD", "field", f"{name}: rule {rule!r} keeps no such values")
    elif request.field not in (pb.FIELD_UNSPECIFIED, pb.FIELD_WEIGHT, pb.FIELD_SCORE):
        raise invalid("INVALID_FIELD", "field", f"{request.field} is neither WEIGHT, SCORE, LOSS nor STRATUM")


def _check_rows(request: pb.ReadWeightsRequest, policy: Policy) -> None:
    rows, rule = policy.rule.trajectory_rows, policy.spec.rule
    if not rows:
        raise invalid("INVALID_FIELD", "first_row", f"rule {rule!r} has no trajectory rows")
    if request.field == pb.FIELD_SCORE:
        raise invalid("INVALID_FIELD", "field", "SCORE is one value per example; rows have WEIGHT alone")
    if not request.num_rows:
        raise invalid("INVALID_FIELD", "num_rows", f"0 with first_row = {request.first_row}; say how many rows to read")
    if request.first_row + request.num_rows > rows:
        description = f"{request.num_rows} from row {request.first_row} on, but rule {rule!r} has rows [0, {rows})"
        raise invalid("OUT_OF_RANGE_VALUE", "num_rows", description)
