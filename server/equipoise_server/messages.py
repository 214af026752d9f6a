"""Messages as they come in: bytes until it is their turn to be parsed."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError

from equipoise_server.errors import invalid

LARGE_BYTES = 1 << 20
PARSED_BYTES_PER_S = 256 << 20
"""How fast messages of a share that are larger than that are parsed: each takes the event loop for milliseconds."""


class Pace:
    """Spreads the large messages of each share, such as a tenant's, over time; for one event loop."""

    def __init__(self) -> None:
        self._free_at: dict[str, float] = {}

    async def wait(self, share: str, num_bytes: int) -> None:
        """Waits for the turn of a message of so many bytes."""
        if num_bytes < LARGE_BYTES:
            return
        now = asyncio.get_running_loop().time()
        self._free_at = {other: at for other, at in self._free_at.items() if at > now}
        turn = self._free_at.get(share, now)
        self._free_at[share] = turn + num_bytes / PARSED_BYTES_PER_S
        if turn > now:
            await asyncio.sleep(turn - now)


@dataclass(frozen=True, slots=True)
class MessageKind:
    """What messages of a method are.

    Attributes:
        name: their protobuf type, for people.
        parse: makes one of bytes.
        max_bytes: longer ones are refused unparsed; 0: none is.
    """

    name: str
    parse: Callable[[bytes], Any]
    max_bytes: int


@dataclass(frozen=True, slots=True)
class Received:
    """A message that came in.

    Attributes:
        data: its bytes.
        kind: what it is to be.
        pace: when it may be parsed.
        share: whose it is.
    """

    data: bytes
    kind: MessageKind
    pace: Pace
    share: str

    @property
    def num_bytes(self) -> int:
        """Its length."""
        return len(self.data)

    async def message(self) -> Any:
        """The message, once it is its turn.

        Raises ServiceError (REQUEST_TOO_LARGE, MALFORMED_REQUEST).
        """
        if 0 < self.kind.max_bytes < self.num_bytes:
            description = f"{self.num_bytes} bytes; a {self.kind.name} has {self.kind.max_bytes} at most"
            raise invalid("REQUEST_TOO_LARGE", "request", description)
        await self.pace.wait(self.share, self.num_bytes)
        try:
            return self.kind.parse(self.data)
        except DecodeError:
            raise invalid("MALFORMED_REQUEST", "request", f"the bytes are no valid {self.kind.name}") from None
