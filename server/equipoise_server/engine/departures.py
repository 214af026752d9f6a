"""Policies that leaving servers still have: the store is asked about all that are waited for at once."""

import asyncio
import time
from collections.abc import Iterable

from equipoise_server.store import RedisStore, StoreError

CHECK_S = 0.05
"""Pause between two questions, seconds."""
PAUSE_PER_CHECK_S = 4.0
"""Seconds of pause for each that a question took: thousands of policies are asked for less often."""
POLICIES_AT_ONCE = 128
"""Policies in one question."""


class Departures:
    """Waits for servers that leave to give policies up; for one event loop.

    Args:
        store: the store that the servers share.
    """

    def __init__(self, store: RedisStore) -> None:
        self._store = store
        self._waiting: dict[str, asyncio.Event] = {}
        self._asking: asyncio.Task[None] | None = None

    async def wait(self, policy: str) -> None:
        """Returns once no server that lives and leaves has the policy, or the store fails; one waiter a policy."""
        over = self._waiting[policy] = asyncio.Event()
        if self._asking is None or self._asking.done():
            self._asking = asyncio.get_running_loop().create_task(self._ask())
        try:
            await over.wait()
        finally:
            del self._waiting[policy]
            if not self._waiting:
                self._asking.cancel()
                self._asking = None

    async def _ask(self) -> None:
        pause_s = CHECK_S
        try:
            while True:
                await asyncio.sleep(pause_s)
                began, policies = time.monotonic(), list(self._waiting)
                for start in range(0, len(policies), POLICIES_AT_ONCE):
                    await self._ask_for(policies[start : start + POLICIES_AT_ONCE])
                pause_s = max(CHECK_S, PAUSE_PER_CHECK_S * (time.monotonic() - began))
        finally:  # a bug must not leave anybody waiting
            self._end_waiting(self._waiting)

    async def _ask_for(self, policies: list[str]) -> None:
        try:
            kept = await self._store.departing(policies)
        except StoreError:  # who waits tries it himself, and hears what is wrong
            kept = set()
        self._end_waiting(set(policies) - kept)

    def _end_waiting(self, policies: Iterable[str]) -> None:
        """Ends the waiting for these."""
        for policy in policies:
            if policy in self._waiting:
                self._waiting[policy].set()
