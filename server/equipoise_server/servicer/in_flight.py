"""Requests under way: how many bytes of them there may be, of each tenant and in all."""

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from equipoise_server.errors import Code, ServiceError


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    size: int
    let_in: "asyncio.Future[None]"


class InFlightBytes:
    """Lets requests in while there is room, each share's in the order of their coming; for one event loop.

    A share that has nothing under way is always let in, however large its request is: nobody can keep others out.

    Args:
        max_bytes: of all requests together.
        max_share_bytes: of one share, such as a tenant's.
        share: by the name of a policy, whose share a request for it belongs to.
    """

    def __init__(self, *, max_bytes: int, max_share_bytes: int, share: Callable[[str], str] = str) -> None:
        self._max_bytes = max_bytes
        self._max_share_bytes = max_share_bytes
        self._share = share
        self._used: Counter[str] = Counter()
        self._lines: dict[str, deque[_Waiting]] = {}

    @property
    def total(self) -> int:
        """Bytes that are under way now."""
        return self._used.total()

    def of_share(self, share: str) -> int:
        """Bytes of one share."""
        return self._used.get(share, 0)

    async def take(self, policy: str, size: int) -> Callable[[], None]:
        """Waits for room for a request of so many bytes; what is returned gives it back, to be called once."""
        share = self._share(policy)
        if share not in self._lines and self._fits(share, size):
            self._used[share] += size
        else:
            await self._wait(share, _Waiting(size, asyncio.get_running_loop().create_future()))
        return lambda: self._give_back(share, size)

    def take_now(self, policy: str, size: int) -> Callable[[], None]:
        """As `take`, without waiting. Raises ServiceError (QUEUE_FULL)."""
        share = self._share(policy)
        if share in self._lines or not self._fits(share, size):
            message = f"{self._used[share]} bytes of requests are under way; retry later or use a stream"
            raise ServiceError(Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", message, retry_after_s=0.1)
        self._used[share] += size
        return lambda: self._give_back(share, size)

    async def _wait(self, share: str, waiting: _Waiting) -> None:
        self._lines.setdefault(share, deque()).append(waiting)
        try:
            await waiting.let_in
        except asyncio.CancelledError:
            if waiting.let_in.cancelled():
                self._let_in()
            else:  # it was let in, and left all the same
                self._give_back(share, waiting.size)
            raise

    def _fits(self, share: str, size: int) -> bool:
        used = self._used[share]
        return not used or (used + size <= self._max_share_bytes and self._used.total() + size <= self._max_bytes)

    def _give_back(self, share: str, size: int) -> None:
        self._used[share] -= size
        if not self._used[share]:
            del self._used[share]
        self._let_in()

    def _let_in(self) -> None:
        for share, line in list(self._lines.items()):
            while line and (line[0].let_in.cancelled() or self._fits(share, line[0].size)):
                waiting = line.popleft()
                if not waiting.let_in.cancelled():
                    self._used[share] += waiting.size
                    waiting.let_in.set_result(None)
            if not line:
                del self._lines[share]
