"""What the first process finds out, told to all others."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from equipoise.errors import InvalidRequestError
from equipoise.torch.processes import rank

_T = TypeVar("_T")


class Agreement:
    """Tells over a group of its own, on the host: the training's collectives may be under way beside it.

    All processes must ask equally often, in the same order.
    """

    def __init__(self) -> None:
        self._group: Any = None

    def on(self, find: Callable[[], _T]) -> _T:
        """What `find` gives in the first process, in all of them: a picklable value.

        Raises:
            InvalidRequestError: it failed there; there its own error is raised.
        """
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        found: list[Any] = [None, ""]
        failure: Exception | None = None
        if rank() == 0:
            try:
                found = [find(), ""]
            except Exception as error:
                failure, found = error, [None, f"in the first process: {error}"]
        dist.broadcast_object_list(found, src=0, group=self._group)
        if failure is not None:
            raise failure
        if found[1]:
            raise InvalidRequestError(found[1])
        value: _T = found[0]
        return value
