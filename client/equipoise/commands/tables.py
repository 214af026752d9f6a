"""Text tables for a terminal."""

from collections.abc import Iterable, Sequence


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns aligned under their heads; None is a dash, floats have five digits."""
    lines = [list(heads), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return "\n".join(row_of(line, widths) for line in lines)


def row_of(cells: Sequence[object], widths: Sequence[int]) -> str:
    """One line of a table whose columns are at least so wide."""
    return "  ".join(_cell(cell).ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.5g}" if isinstance(value, float) else str(value)
