"""The array namespace of the rules' arithmetic: numpy on views of tables in host memory, torch on a GPU.

One formula serves both: it uses what the two modules call alike (`where`, `clip`, `round`, `asarray` with a dtype), and
each such operation is exact or correctly rounded, so that both give the same bits. For 64 rows numpy takes less than
half of torch's time.
"""

from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

Array: TypeAlias = Any
"""An array of numpy, or a tensor of torch."""

Namespace: TypeAlias = Any
"""The module numpy, or torch."""

NUMPY_ON_CPU = True
"""False: torch everywhere, as on a GPU; for tests."""


def namespace(array: Array) -> Namespace:
    """The module of an array."""
    return np if isinstance(array, np.ndarray) else torch


def table(column: torch.Tensor) -> Array:
    """A column in its namespace, without a copy."""
    return column.numpy() if NUMPY_ON_CPU and column.is_cpu else column


def there(array: Array, values: NDArray[Any]) -> Array:
    """Values of the host where `array` is."""
    if isinstance(array, np.ndarray):
        return values
    return torch.from_numpy(values if values.flags.writeable else values.copy()).to(array.device)


def here(array: Array) -> NDArray[Any]:
    """An array on the host."""
    return array if isinstance(array, np.ndarray) else np.asarray(array.cpu().numpy())


def rows_of(column: Array, ids: NDArray[np.int64] | None) -> Array | None:
    """An index of the rows `ids` of a column; None: all of them.

    Raises IndexError when one is not there: numpy would count from behind, and a GPU would fail as a whole.
    """
    if ids is None:
        return None
    if len(ids) and ids.view(np.uint64).max() >= len(column):
        raise IndexError(f"ids must be in [0, {len(column)})")
    return there(column, ids)


def gather(column: Array, rows: Array | None) -> Array:
    """The rows of a column at an index, copied; None: the column itself."""
    return column if rows is None else column[rows]


def scatter(column: Array, rows: Array | None, values: Array) -> None:
    """Writes the rows of a column at an index, distinct; None: all of them."""
    column[... if rows is None else rows] = values


def sums(*values: Array) -> list[int]:
    """Sums of arrays of integers: a single read brings them off the device."""
    if isinstance(values[0], np.ndarray):
        return [int(np.add.reduce(each)) for each in values]
    return [int(total) for total in torch.stack([each.sum() for each in values]).tolist()]
