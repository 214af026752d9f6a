"""Sketches on the wire: checked, and turned into contributions."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from equipoise.v1 import policy_pb2 as pb
from equipoise_server.errors import invalid
from equipoise_server.rules import sketched_contributions
from equipoise_server.servicer.fields import StepFields

SKETCHES, TARGET = "gradient_sketches", "target_sketch"
MAX_VALUES = 65_536
"""k is at most this."""

_TYPES: dict[int, np.dtype[Any]] = {
    pb.SKETCH_TYPE_UNSPECIFIED: np.dtype("<f4"),
    pb.SKETCH_TYPE_FLOAT32: np.dtype("<f4"),
    pb.SKETCH_TYPE_FLOAT16: np.dtype("<f2"),
}


def parse_sketches(
    request: StepFields, *, rows: int, scored: NDArray[np.bool_] | None, device: torch.device
) -> NDArray[np.float32] | None:
    """Contributions float32 per row, finite where scored; None where the request has no sketches.

    Raises ServiceError (SHAPE_MISMATCH, OUT_OF_RANGE_VALUE, NON_FINITE_STAT).
    """
    if not request.gradient_sketches and not request.target_sketch:
        return None
    for name, other in ((SKETCHES, TARGET), (TARGET, SKETCHES)):
        if not getattr(request, name):
            raise invalid("SHAPE_MISMATCH", name, f"absent, but {other} is there; send both or none")
    if request.contributions:
        raise invalid("SHAPE_MISMATCH", SKETCHES, "sent with contributions; send either")
    target = _parse_target(request)
    sketches = _parse_rows(request, target, rows, scored)
    contributions = sketched_contributions(sketches, target, device=device)
    _check_finite(contributions, scored, "its product with target_sketch is {value}, not finite as float32")
    return contributions


def _parse_target(request: StepFields) -> NDArray[np.floating[Any]]:
    kind = _TYPES.get(request.sketch_type)
    if kind is None:
        raise invalid("OUT_OF_RANGE_VALUE", "sketch_type", f"{request.sketch_type} is not a SketchType")
    size = len(request.target_sketch)
    if size % kind.itemsize:
        description = f"{size} bytes are no whole number of {kind.name} values ({kind.itemsize} bytes each)"
        raise invalid("SHAPE_MISMATCH", TARGET, description)
    if size > MAX_VALUES * kind.itemsize:
        raise invalid("OUT_OF_RANGE_VALUE", TARGET, f"{size // kind.itemsize} values, must be at most {MAX_VALUES}")
    target: NDArray[np.floating[Any]] = np.frombuffer(request.target_sketch, kind)
    bad = ~np.isfinite(target)
    if bad.any():
        index = int(np.argmax(bad))
        raise invalid("NON_FINITE_STAT", f"{TARGET}[{index}]", f"{target[index]} is not finite; all values must be")
    return target


def _parse_rows(
    request: StepFields, target: NDArray[np.floating[Any]], rows: int, scored: NDArray[np.bool_] | None
) -> NDArray[np.floating[Any]]:
    data, k = request.gradient_sketches, len(target)
    if len(data) != rows * k * target.itemsize:
        description = f"{len(data)} bytes for {rows} rows; {k} {target.dtype.name} values per row, as in {TARGET}"
        raise invalid("SHAPE_MISMATCH", SKETCHES, description)
    sketches: NDArray[np.floating[Any]] = np.frombuffer(data, target.dtype).reshape(rows, k)
    _check_finite(sketches.sum(axis=1, dtype=np.float64), scored, "its values are not finite; scored rows must be")
    return sketches


def _check_finite(values: NDArray[np.floating[Any]], scored: NDArray[np.bool_] | None, description: str) -> None:
    bad = ~np.isfinite(values)
    if scored is not None:
        bad &= scored
    if bad.any():
        index = int(np.argmax(bad))
        raise invalid("NON_FINITE_STAT", f"{SKETCHES}[{index}]", description.format(value=values[index]))
