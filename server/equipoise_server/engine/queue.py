"""A policy's queue: steps wait here, bounded in number and bytes, and every one that was taken is answered once."""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from equipoise_server.engine.step import Answer, Step
from equipoise_server.errors import Code, ServiceError

Told: TypeAlias = Callable[[Answer | Exception], None]
"""Hears once what became of a step; never raises."""


@dataclass(slots=True, eq=False)
class Pending:
    """A step on its way: who hears of its answer, since when (loop time, seconds) it waits, and its bytes."""

    step: Step
    told: Told
    since: float
    size: int


def into(answer: asyncio.Future[Answer]) -> Told:
    """Puts what became of a step into a future, unless its owner has left."""

    def tell(result: Answer | Exception) -> None:
        if answer.done():
            return
        if isinstance(result, Exception):
            answer.set_exception(result)
            answer.exception()  # told: that the caller may have gone is no error of its own
        else:
            answer.set_result(result)

    return tell


class StepQueue:
    """First in, first out; for one event loop.

    It knows every step from its arrival to its answer, wherever it is in between: when it closes, all are answered.

    Args:
        policy: name, for messages.
        max_steps: most steps that wait.
        max_bytes: most bytes that wait; one step always fits into an empty queue.
        clock: loop time, seconds.
    """

    def __init__(self, policy: str, *, max_steps: int, max_bytes: int, clock: Callable[[], float]) -> None:
        self._policy = policy
        self._max_steps = max_steps
        self._max_bytes = max_bytes
        self._clock = clock
        self._waiting: deque[Pending] = deque()
        self._unanswered: set[Pending] = set()
        self._filled = asyncio.Event()
        self._drained = asyncio.Event()
        self.closed: ServiceError | None = None
        """Why nothing is taken any more."""
        self.size = 0
        """Bytes that wait."""

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def fill_ratio(self) -> float:
        """How full it is, by steps or by bytes."""
        return max(len(self) / self._max_steps, self.size / self._max_bytes)

    @property
    def is_busy(self) -> bool:
        """Whether a step has no answer yet."""
        return bool(self._unanswered)

    async def put(self, step: Step, told: Told) -> None:
        """Queues a step as soon as there is room. Raises what closed the queue."""
        size = step.nbytes
        while self.closed is None and self._is_full(size):
            self._drained.clear()
            await self._drained.wait()
        self._append(step, told, size)

    def put_now(self, step: Step, told: Told) -> None:
        """Queues a step. Raises ServiceError: QUEUE_FULL when there is no room, or what closed the queue."""
        size = step.nbytes
        if self.closed is None and self._is_full(size):
            message = f"policy {self._policy!r} has {len(self)} steps waiting; retry later or use a stream"
            raise ServiceError(Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", message, retry_after_s=0.1)
        self._append(step, told, size)

    async def wait(self) -> None:
        """Returns when a step waits, or the queue has closed."""
        while not self._waiting and self.closed is None:
            self._filled.clear()
            await self._filled.wait()

    def take(self, count: int) -> list[Pending]:
        """The oldest that wait, at most `count`."""
        taken = [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]
        self.size -= sum(pending.size for pending in taken)
        self._drained.set()
        return taken

    def settle(self, pending: Pending, result: Answer | Exception) -> None:
        """Answers a step, unless it was answered."""
        if pending in self._unanswered:
            self._unanswered.discard(pending)
            pending.told(result)

    def refuse(self, error: ServiceError) -> None:
        """Takes nothing any more: what waits, and whoever waits for room, is answered with the error."""
        self.closed = self.closed or error
        waiting, self._waiting, self.size = self._waiting, deque(), 0
        for pending in waiting:
            self.settle(pending, error)
        self._filled.set()
        self._drained.set()

    def close(self, error: ServiceError) -> None:
        """Answers every step that was ever taken and has no answer yet."""
        self.refuse(error)
        for pending in list(self._unanswered):
            self.settle(pending, error)

    def _is_full(self, size: int) -> bool:
        return bool(self._waiting) and (len(self._waiting) >= self._max_steps or self.size + size > self._max_bytes)

    def _append(self, step: Step, told: Told, size: int) -> None:
        if self.closed is not None:
            raise self.closed.again()
        pending = Pending(step, told, self._clock(), size)
        self._waiting.append(pending)
        self._unanswered.add(pending)
        self.size += size
        self._filled.set()
