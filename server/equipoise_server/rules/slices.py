"""Long work in slices, so that whoever shares the thread waits for one of them at most."""

import math
from collections.abc import Generator
from typing import TypeAlias, TypeVar

import torch

from equipoise_server.rules.sums import spans

T = TypeVar("T")

Slices: TypeAlias = Generator[None, None, T]
"""Yields between two slices and returns the result."""

SLICE_VALUES = 1 << 20
"""Values that are filled in one slice: a millisecond or two where memory is touched for the first time."""


def exhaust(slices: Slices[T]) -> T:
    """The result, after running all slices at once."""
    while True:
        try:
            next(slices)
        except StopIteration as ended:
            result: T = ended.value
            return result


def fill(column: torch.Tensor, value: float) -> Slices[None]:
    """Sets all of a column [R] or [R, values per row]; one on device `meta` has nothing to set."""
    if column.is_meta:
        return
    rows = max(1, SLICE_VALUES // math.prod(column.shape[1:]))
    for span in spans(len(column), rows=rows):
        column[span] = value
        yield
