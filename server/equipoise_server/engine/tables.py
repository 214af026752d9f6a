"""Tables as bytes: pages for the store, whole columns for forks and exports."""

from collections.abc import Mapping

import torch

from equipoise_server.rules import PAGE_EXAMPLES, TableState


def page_bounds(state: TableState, index: int) -> tuple[int, int]:
    """First example of a page, and the one behind its last."""
    start = index * PAGE_EXAMPLES
    return start, min(start + PAGE_EXAMPLES, state.num_examples)


def slice_bytes(column: torch.Tensor, start: int, stop: int) -> bytes:
    """Little-endian values of a column's rows, copied."""
    return bytes(column[start:stop].cpu().numpy().tobytes())


def capture_page(state: TableState, index: int) -> dict[str, bytes]:
    """A copy of one page, by column."""
    start, stop = page_bounds(state, index)
    return {name: slice_bytes(column, start, stop) for name, column in state.columns.items()}


def load_page(state: TableState, index: int, columns: Mapping[str, bytes]) -> None:
    """Puts a captured page back. Raises ValueError when it does not fit the state's tables."""
    start, stop = page_bounds(state, index)
    if set(columns) != set(state.columns):
        raise ValueError(f"page {index} has columns {sorted(columns)}, the rule keeps {sorted(state.columns)}")
    for name, data in columns.items():
        load_slice(state.columns[name], name, start, stop, data)


def load_slice(column: torch.Tensor, name: str, start: int, stop: int, data: bytes) -> None:
    """Overwrites rows `start` to `stop` of a column. Raises ValueError when `data` has another length."""
    expected = (stop - start) * column.element_size()
    if len(data) != expected:
        raise ValueError(f"column {name!r}, rows {start} to {stop}: {len(data)} bytes, expected {expected}")
    if data:
        column[start:stop] = torch.frombuffer(bytearray(data), dtype=column.dtype).to(column.device)
