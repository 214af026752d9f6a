"""Who sends the steps of a case."""

from typing import Protocol, TypeAlias

Sent: TypeAlias = tuple[int, list[float]]
"""What a trainer has sent: how many steps, and seconds of each, where it is known."""


class Caller(Protocol):
    """Sends the steps of all trainers of a case to one server."""

    async def send(self, seconds: float) -> list[Sent]:
        """Sends for so long, and waits for what is out; what each trainer has sent."""
        ...
