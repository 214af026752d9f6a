"""A trainer's open stream, seen from the policy."""

import asyncio
from collections.abc import Callable

from equipoise_server.errors import ServiceError


class Session:
    """One open stream of one trainer."""

    def __init__(self, trainer_id: str) -> None:
        self.trainer_id = trainer_id
        self.ended: asyncio.Future[ServiceError] = asyncio.get_running_loop().create_future()
        """Why the stream has to end, once it has to."""
        self.on_drain: Callable[[], None] = lambda: None
        """Asks the trainer to reconnect."""

    def end(self, error: ServiceError) -> None:
        """Tells the stream to end."""
        if not self.ended.done():
            self.ended.set_result(error)
