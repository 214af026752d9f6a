"""One at a time among all servers of one Redis, for what is no policy's own."""

import asyncio
import random
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from equipoise_server.store import scripts
from equipoise_server.store.commands import Commands
from equipoise_server.store.errors import StoreError, Unavailable
from equipoise_server.store.keys import lock_key

_POLL_S = 0.02


class Locks:
    """Locks by name. A lock whose holder dies, or that takes too long, ends by itself: do not build safety on it."""

    def __init__(self, commands: Commands, *, prefix: str) -> None:
        self._commands = commands
        self._prefix = prefix

    @asynccontextmanager
    async def lock(self, name: str, *, lease_s: float, wait_s: float) -> AsyncIterator[None]:
        """Surrounds what only one server may do at a time.

        Args:
            name: of what.
            lease_s: seconds after which another may begin, whatever happens here.
            wait_s: longest wait for it.

        Raises:
            Unavailable: it was not free within `wait_s` (`busy`), or as for every command.
        """
        key, token = lock_key(self._prefix, name), secrets.token_hex(16)
        end = asyncio.get_running_loop().time() + wait_s
        try:
            while not await self._commands.run("lock", "SET", key, token, "NX", "PX", round(lease_s * 1000)):
                if asyncio.get_running_loop().time() > end:
                    raise Unavailable(f"{name!r}: other servers were busy with it for {wait_s:g} s", kind="busy")
                await asyncio.sleep(_POLL_S * (0.5 + random.random()))
            yield
        finally:  # also after a SET that failed: it may have been applied
            with suppress(StoreError):
                await self._commands.script("lock", scripts.UNLOCK, policy=name, keys=[key], arguments=[token])
