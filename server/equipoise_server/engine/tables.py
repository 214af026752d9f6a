"""Tables as bytes, page by page."""

import math
from collections.abc import Mapping

import torch

from equipoise_server.rules import TableState


def page_bounds(state: TableState, index: int) -> tuple[int, int]:
    """First row of a page, and the one behind its last."""
    start = index * state.page_rows
    return start, min(start + state.page_rows, state.num_rows)


def row_bytes(column: torch.Tensor) -> int:
    """Bytes of one row of a column."""
    return column.element_size() * math.prod(column.shape[1:])


def page_columns(state: TableState, index: int) -> dict[str, torch.Tensor]:
    """Views of one page, by column."""
    start, stop = page_bounds(state, index)
    return {name: column[start:stop] for name, column in state.columns.items()}


def to_bytes(values: torch.Tensor) -> bytes:
    """Little-endian values, copied."""
    return bytes(values.cpu().numpy().tobytes())


def capture_page(state: TableState, index: int) -> dict[str, bytes]:
    """A copy of one page, by column."""
    return {name: to_bytes(values) for name, values in page_columns(state, index).items()}


def load_page(state: TableState, index: int, columns: Mapping[str, bytes]) -> None:
    """Puts a captured page back. Raises ValueError when it does not fit the state's tables."""
    start, stop = page_bounds(state, index)
    if set(columns) != set(state.columns):
        raise ValueError(f"page {index} has columns {sorted(columns)}, the rule keeps {sorted(state.columns)}")
    for name, data in columns.items():
        load_slice(state.columns[name], name, start, stop, data)


def load_slice(column: torch.Tensor, name: str, start: int, stop: int, data: bytes) -> None:
    """Overwrites rows `start` to `stop` of a column. Raises ValueError when `data` has another length."""
    expected = (stop - start) * row_bytes(column)
    if len(data) != expected:
        raise ValueError(f"column {name!r}, rows {start} to {stop}: {len(data)} bytes, expected {expected}")
    if data:
        values = torch.frombuffer(bytearray(data), dtype=column.dtype)
        column[start:stop] = values.view(stop - start, *column.shape[1:]).to(column.device)
