"""Arrays on the wire: little-endian bytes to NumPy and back, checked."""

import numpy as np
from numpy.typing import NDArray

from equipoise_server.errors import invalid


def parse_ids(data: bytes, *, field: str, num_examples: int, most: int) -> NDArray[np.int64]:
    """uint64 ids in [0, num_examples), at most `most`. Raises ServiceError (SHAPE_MISMATCH, ID_OUT_OF_RANGE)."""
    if len(data) % 8:
        raise invalid("SHAPE_MISMATCH", field, f"{len(data)} bytes are no whole number of uint64 ids (8 bytes each)")
    ids = np.frombuffer(data, "<u8")
    if len(ids) > most:
        raise invalid("TOO_MANY_EXAMPLES", field, f"{len(ids)} ids, the limit max_batch_examples is {most}")
    if len(ids) and ids.max() >= num_examples:
        index = int(np.argmax(ids >= num_examples))
        raise invalid(
            "ID_OUT_OF_RANGE", f"{field}[{index}]", f"id {ids[index]} is not in [0, {num_examples}), the policy's ids"
        )
    return ids.view("<i8")


def parse_mask(data: bytes, *, field: str, rows: int) -> NDArray[np.bool_] | None:
    """One byte per row, 0 or 1; None for absent, all 1. Raises ServiceError (SHAPE_MISMATCH, OUT_OF_RANGE_VALUE)."""
    if not data:
        return None
    if len(data) != rows:
        raise invalid("SHAPE_MISMATCH", field, f"{len(data)} bytes for {rows} rows; one byte per row")
    mask = np.frombuffer(data, np.uint8)
    if mask.max() > 1:
        index = int(np.argmax(mask > 1))
        raise invalid("OUT_OF_RANGE_VALUE", f"{field}[{index}]", f"{mask[index]} is neither 0 nor 1")
    return mask.view(np.bool_)


def parse_groups(data: bytes, *, rows: int, field: str = "groups") -> NDArray[np.int64] | None:
    """uint32 per row; None for absent. Raises ServiceError (SHAPE_MISMATCH)."""
    if not data:
        return None
    if len(data) != 4 * rows:
        raise invalid("SHAPE_MISMATCH", field, f"{len(data)} bytes for {rows} rows; one uint32 (4 bytes) per row")
    return np.frombuffer(data, "<u4").astype(np.int64)


def parse_outcomes(
    successes: bytes, attempts: bytes, *, rows: int, scored: NDArray[np.bool_] | None
) -> dict[str, NDArray[np.int64]]:
    """`successes` and `attempts`, uint32 per row; empty for absent ones.

    Raises ServiceError: SHAPE_MISMATCH; OUT_OF_RANGE_VALUE where a scored row has no attempt, or more successes.
    """
    given = {"successes": successes, "attempts": attempts}
    for name, data in given.items():
        if not data and (successes or attempts):
            raise invalid("SHAPE_MISMATCH", name, "absent; successes and attempts go together")
        if len(data) not in (0, 4 * rows):
            raise invalid("SHAPE_MISMATCH", name, f"{len(data)} bytes for {rows} rows; one uint32 (4 bytes) per row")
    if not attempts:
        return {}
    won, tried = (np.frombuffer(data, "<u4").astype(np.int64) for data in given.values())
    counts = np.ones(rows, np.bool_) if scored is None else scored
    if (bad := counts & (tried == 0)).any():
        raise invalid("OUT_OF_RANGE_VALUE", f"attempts[{int(np.argmax(bad))}]", "0; a scored row has at least 1")
    if (bad := counts & (won > tried)).any():
        row = int(np.argmax(bad))
        raise invalid("OUT_OF_RANGE_VALUE", f"successes[{row}]", f"{won[row]} of {tried[row]} attempts; at most these")
    return {"successes": won, "attempts": tried}


def parse_statistic(
    data: bytes, *, field: str, rows: int, scored: NDArray[np.bool_] | None
) -> NDArray[np.float32] | None:
    """float32 per row, finite where scored; None for absent. Raises ServiceError (SHAPE_MISMATCH, NON_FINITE_STAT)."""
    if not data:
        return None
    if len(data) != 4 * rows:
        raise invalid("SHAPE_MISMATCH", field, f"{len(data)} bytes for {rows} rows; one float32 (4 bytes) per row")
    values = np.frombuffer(data, "<f4")
    bad = ~np.isfinite(values)
    if scored is not None:
        bad &= scored
    if bad.any():
        index = int(np.argmax(bad))
        raise invalid("NON_FINITE_STAT", f"{field}[{index}]", f"{values[index]} is not finite; scored rows must be")
    return values


def to_bytes(values: NDArray[np.float32]) -> bytes:
    """float32 values, little-endian."""
    return values.astype("<f4", copy=False).tobytes()
