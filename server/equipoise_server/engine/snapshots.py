"""Readers of whole policies, such as exports, forks and samples: a few at once, as each may come to be a copy."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

from equipoise_server.engine.policy import Policy
from equipoise_server.engine.snapshot import Snapshot
from equipoise_server.errors import Code, ServiceError

MAX_SNAPSHOTS = 8
"""Readers of one policy at once."""

Read: TypeAlias = Callable[[Callable[[Policy], Snapshot]], Coroutine[Any, Any, Snapshot]]
"""Calls back with the policy between two device calls."""


class Snapshots:
    """The snapshots of one policy in service.

    Args:
        policy: the policy.
        wait_s: how long a reader waits for another to end.
    """

    def __init__(self, policy: Policy, *, wait_s: float) -> None:
        self._policy = policy
        self._wait_s = wait_s
        self._places = asyncio.Semaphore(MAX_SNAPSHOTS)

    @asynccontextmanager
    async def take(self, read: Read) -> AsyncIterator[Snapshot]:
        """The policy of now, for reading while steps go on.

        Raises ServiceError (TOO_MANY_READERS) when others hold so many for so long: each may come to be a copy of the
        tables.
        """
        try:
            async with asyncio.timeout(self._wait_s):
                await self._places.acquire()
        except TimeoutError:
            name = self._policy.spec.name
            message = f"policy {name!r} is being exported, forked or sampled {MAX_SNAPSHOTS} times already"
            raise ServiceError(Code.RESOURCE_EXHAUSTED, "TOO_MANY_READERS", message, retry_after_s=1.0) from None
        taking = asyncio.ensure_future(read(lambda policy: policy.snapshot()))
        try:
            yield await asyncio.shield(taking)
        finally:
            taking.add_done_callback(self._close)  # also one that comes after its caller has gone

    def _close(self, taking: "asyncio.Future[Snapshot]") -> None:
        self._places.release()
        if not taking.cancelled() and taking.exception() is None:
            self._policy.close_snapshot(taking.result())
