"""How late the event loop wakes: what blocks it delays every stream."""

import asyncio
from collections.abc import Callable

INTERVAL_S = 0.25


async def measure_lag(observe: Callable[[float], None], *, interval_s: float = INTERVAL_S) -> None:
    """Reports for ever, every `interval_s`, how much later than asked a sleep ended."""
    clock = asyncio.get_running_loop().time
    while True:
        due = clock() + interval_s
        await asyncio.sleep(interval_s)
        observe(max(0.0, clock() - due))
