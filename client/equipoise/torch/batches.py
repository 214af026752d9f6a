"""Batches of a job: each with the one after it, and those that stay on the host."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def look_ahead(batches: Iterable[T]) -> Iterator[tuple[T, T | None]]:
    """Each batch together with the one after it; None after the last.

    Example:
        >>> list(look_ahead("abc"))
        [('a', 'b'), ('b', 'c'), ('c', None)]
    """
    rest = iter(batches)
    try:
        current = next(rest)
    except StopIteration:
        return
    for following in rest:
        yield current, following
        current = following
    yield current, None


class HostBatches:
    """Batches that stay where they are, and are moved one at a time.

    A refresh of the target direction takes one batch after another: of a target set that is kept on the device whole,
    nearly all of it would only take memory there.

    Args:
        batches: the batches, on the host.
        move: from a batch to the batch on the device.
    """

    def __init__(self, batches: Iterable[Any], move: Callable[[Any], Any]) -> None:
        self._batches = list(batches)
        self._move = move

    def __len__(self) -> int:
        """How many batches there are."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        """The batches on the device."""
        return map(self._move, self._batches)
