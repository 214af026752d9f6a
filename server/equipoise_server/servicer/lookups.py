"""Finding policies that are not in memory: a tenant takes so many turns at once, and others need not wait for his."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

from equipoise_server.engine import Engine, PolicyRunner, Wish
from equipoise_server.interceptors import wished
from equipoise_server.security import caller
from equipoise_server.store import StoredPolicy

TURNS = 4
"""Lookups of one tenant under way at once: the store has some connections, and steps need them, too."""


class Lookups:
    """Finds policies for callers; for one event loop.

    What is in memory is found at once. For the rest the store is asked, one short question a name, before anything is
    begun for it: names that do not exist cost no more.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def find(self, name: str) -> StoredPolicy:
        """The stored policy. Raises ServiceError as `Engine.find` does."""
        async with self.turn():
            return await self._engine.find(name)

    async def runner(
        self, name: str, *, uid: str = "", wait_s: float | None = None, wish: Wish | None = None
    ) -> PolicyRunner:
        """The policy in service; see `Engine.runner`. `wish`: None: what the call says."""
        if not self._engine.is_known(name):
            await self.find(name)
        return await self._engine.runner(name, uid=uid, wait_s=wait_s, wish=wished.get() if wish is None else wish)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Surrounds what asks the store on a caller's behalf."""
        turns = self._turns.setdefault(caller().tenant.name, asyncio.Semaphore(TURNS))
        async with turns:
            yield
