"""A trainer's open stream, seen from the policy, and how far each trainer's steps are in the store."""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from equipoise_server.errors import ServiceError


@dataclass(frozen=True, slots=True)
class Opener:
    """Who opens a stream: a client, and which of its openings it is.

    Attributes:
        client_id: names the client; empty: unknown.
        attempt: number of the opening, rising.
    """

    client_id: str = ""
    attempt: int = 0

    def is_behind(self, other: "Opener") -> bool:
        """Whether a later opening of the same client has arrived before this one."""
        return bool(self.client_id) and self.client_id == other.client_id and self.attempt < other.attempt


ANONYMOUS = Opener()
"""A client without an id: each of its openings counts as new."""


class Session:
    """One open stream of one trainer."""

    def __init__(self, trainer_id: str, opener: Opener) -> None:
        self.trainer_id = trainer_id
        self.opener = opener
        self.ended: asyncio.Future[ServiceError] = asyncio.get_running_loop().create_future()
        """Why the stream has to end, once it has to."""
        self._on_drain: Callable[[], None] | None = None
        self._draining = False

    def when_draining(self, call: Callable[[], None]) -> None:
        """Calls back, once, when the trainer is to be asked to reconnect: at once if it is already."""
        self._on_drain = call
        if self._draining:
            call()

    def drain(self) -> None:
        """The trainer is to reconnect elsewhere."""
        self._draining = True
        if self._on_drain is not None:
            self._on_drain()

    def end(self, error: ServiceError) -> None:
        """Tells the stream to end."""
        if not self.ended.done():
            self.ended.set_result(error)


@dataclass(slots=True)
class DurableSequences:
    """Per trainer: which of its applied steps are in the store."""

    durable: dict[str, int] = field(default_factory=dict)
    applied: dict[str, deque[tuple[int, int]]] = field(default_factory=dict)

    def add(self, trainer_id: str, *, version: int, sequence: int) -> None:
        """Notes that a trainer's step became a version."""
        self.applied.setdefault(trainer_id, deque()).append((version, sequence))

    def get(self, trainer_id: str, *, durable_version: int) -> int:
        """All steps of the trainer up to this sequence are in the store."""
        waiting = self.applied.get(trainer_id)
        while waiting and waiting[0][0] <= durable_version:
            self.durable[trainer_id] = waiting.popleft()[1]
        return self.durable.get(trainer_id, 0)

    def forget(self, trainer_id: str) -> None:
        """The trainer starts anew."""
        self.durable.pop(trainer_id, None)
        self.applied.pop(trainer_id, None)
