"""A policy's queue: steps wait here, bounded in number and bytes, and are taken together."""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from equipoise_server.engine.step import Answer, Step
from equipoise_server.errors import Code, ServiceError


@dataclass(slots=True)
class Pending:
    """A step on its way: where its answer goes, and since when (loop time, seconds) it waits."""

    step: Step
    answer: asyncio.Future[Answer]
    since: float


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueLimits:
    """How much may wait: steps, and bytes. One step always fits into an empty queue."""

    steps: int
    size: int


class StepQueue:
    """First in, first out; for one event loop."""

    def __init__(self, limits: QueueLimits, *, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self._waiting: deque[Pending] = deque()
        self._filled = asyncio.Event()
        self._drained = asyncio.Event()
        self.size = 0
        """Bytes that wait."""

    def __len__(self) -> int:
        return len(self._waiting)

    async def put(self, step: Step) -> asyncio.Future[Answer]:
        """Queues a step as soon as there is room; its answer comes through the future."""
        while self._is_full(step):
            self._drained.clear()
            await self._drained.wait()
        return self._append(step)

    def put_now(self, step: Step, *, policy: str) -> asyncio.Future[Answer]:
        """Queues a step. Raises ServiceError (QUEUE_FULL) when there is no room."""
        if self._is_full(step):
            message = f"policy {policy!r} has {len(self)} steps waiting; retry later or use a stream"
            raise ServiceError(Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", message, retry_after_s=0.1)
        return self._append(step)

    async def take(self) -> list[Pending]:
        """All that waits, at least one."""
        while not self._waiting:
            self._filled.clear()
            await self._filled.wait()
        taken = list(self._waiting)
        self._waiting.clear()
        self.size = 0
        self._drained.set()
        return taken

    def fail(self, error: Exception) -> None:
        """Answers all that waits with an error."""
        while self._waiting:
            pending = self._waiting.popleft()
            if not pending.answer.done():
                pending.answer.set_exception(error)
        self.size = 0
        self._drained.set()

    def _is_full(self, step: Step) -> bool:
        return bool(self._waiting) and (
            len(self._waiting) >= self._limits.steps or self.size + step.size > self._limits.size
        )

    def _append(self, step: Step) -> asyncio.Future[Answer]:
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append(Pending(step, answer, self._clock()))
        self.size += step.size
        self._filled.set()
        return answer
