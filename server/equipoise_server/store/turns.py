"""One at a time among all servers of one Redis, for what is no policy's own."""

import asyncio
import random
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from equipoise_server.store import scripts
from equipoise_server.store.commands import Commands
from equipoise_server.store.errors import StoreError, Unavailable
from equipoise_server.store.keys import turn_key

_POLL_S = 0.02


class Turns:
    """Turns by name. A turn whose server dies, or that takes too long, ends by itself: do not build safety on it."""

    def __init__(self, commands: Commands, *, prefix: str) -> None:
        self._commands = commands
        self._prefix = prefix

    @asynccontextmanager
    async def turn(self, name: str, *, lasts_s: float, patience_s: float) -> AsyncIterator[None]:
        """Surrounds what only one server may do at a time.

        Args:
            name: of what.
            lasts_s: seconds after which another may begin, whatever happens here.
            patience_s: longest wait for it.

        Raises:
            Unavailable: it was not our turn within `patience_s` (`busy`), or as for every command.
        """
        key, token = turn_key(self._prefix, name), secrets.token_hex(16)
        end = asyncio.get_running_loop().time() + patience_s
        try:
            while not await self._commands.run("turn", "SET", key, token, "NX", "PX", round(lasts_s * 1000)):
                if asyncio.get_running_loop().time() > end:
                    raise Unavailable(f"{name!r}: other servers were busy with it for {patience_s:g} s", kind="busy")
                await asyncio.sleep(_POLL_S * (0.5 + random.random()))
            yield
        finally:  # also after a SET that failed: it may have been applied
            with suppress(StoreError):
                await self._commands.script("turn", scripts.END_TURN, policy=name, keys=[key], arguments=[token])
