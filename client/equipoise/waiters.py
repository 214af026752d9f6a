"""Threads, or tasks, that wait for something to hold: each is woken when it does, and not before.

A condition variable wakes all of its waiters at every change. A wake-up costs as much as what a step computes, and of
those that one answer could cause most find nothing to do: a writer without a message, a flush with steps to go.
"""

import asyncio
import threading
from collections.abc import Callable
from time import monotonic


class Waiters:
    """Threads that wait.

    Args:
        lock: held for every call, and for whatever changes what is waited for.
    """

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self._waiting: list[tuple[Callable[[], bool], threading.Lock]] = []

    def wait_for(self, holds: Callable[[], bool], timeout: float | None = None) -> bool:
        """Waits, at most so many seconds, until something holds; whether it does. Lets go of the lock meanwhile."""
        end = None if timeout is None else monotonic() + timeout
        while not holds():
            rest = -1.0 if end is None else end - monotonic()
            if end is not None and rest <= 0:
                return False
            self._block(holds, min(rest, threading.TIMEOUT_MAX))
        return True

    def notify(self) -> None:
        """Something has changed: wakes those for whom it holds now."""
        for waiter in [each for each in self._waiting if each[0]()]:
            self._waiting.remove(waiter)
            waiter[1].release()

    def _block(self, holds: Callable[[], bool], timeout: float) -> None:
        blocked = threading.Lock()
        blocked.acquire()
        waiter = (holds, blocked)
        self._waiting.append(waiter)
        self._lock.release()
        try:
            blocked.acquire(timeout=timeout)
        finally:
            self._lock.acquire()
            if waiter in self._waiting:
                self._waiting.remove(waiter)


class AioWaiters:
    """Tasks of one event loop that wait."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []

    async def wait_for(self, holds: Callable[[], bool], timeout: float | None = None) -> bool:
        """Waits, at most so many seconds, until something holds; whether it does."""
        end = None if timeout is None else monotonic() + timeout
        while not holds():
            rest = None if end is None else end - monotonic()
            if rest is not None and rest <= 0:
                return False
            await self._block(holds, rest)
        return True

    def notify(self) -> None:
        """Something has changed: wakes those for whom it holds now."""
        for waiter in [each for each in self._waiting if each[0]()]:
            self._waiting.remove(waiter)
            _release(waiter[1])

    async def _block(self, holds: Callable[[], bool], timeout: float | None) -> None:
        loop = asyncio.get_running_loop()
        blocked = loop.create_future()
        waiter = (holds, blocked)
        self._waiting.append(waiter)
        timer = None if timeout is None else loop.call_later(timeout, _release, blocked)
        try:
            await blocked
        finally:
            if timer is not None:
                timer.cancel()
            if waiter in self._waiting:
                self._waiting.remove(waiter)


def _release(blocked: "asyncio.Future[None]") -> None:
    if not blocked.done():
        blocked.set_result(None)
