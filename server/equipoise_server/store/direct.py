"""The short way to Redis, for what steps wait for: connections without a client's work around each command.

Around a command redis-py's client waits for a place in its pool, starts four timers and a task, and keeps records:
that takes more time than Redis does for a step. Its connections are used all the same: they find the master through
Sentinels, enter with TLS and credentials, and read answers.
"""

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import hiredis
from redis.asyncio import Connection, ConnectionPool
from redis.asyncio.sentinel import SentinelConnectionPool
from redis.exceptions import ConnectionError as Disconnected
from redis.exceptions import NoScriptError, ResponseError

from equipoise_server.patience import Patience

Argument: TypeAlias = str | bytes | int | float

PIECE_BYTES = 1 << 20
"""Of what is larger, so much goes out at a time."""
BUFFERED_BYTES = 4 << 20
"""What systems on the way may hold back of a large command that has left, about."""


class DirectConnections:
    """Runs commands on connections of its own, one command or run of commands at a time on each.

    A failure closes its connection, and so does a call that is cancelled or takes too long; the next command opens it
    anew, at the master of then.

    Args:
        pool: makes the connections, and keeps none of them.
        at_most: connections at once; further commands wait.
        timeout_s: longest wait for a connection, for it to be opened, for each PIECE_BYTES to leave, and for an answer;
            for that, as much again for each BUFFERED_BYTES.
    """

    def __init__(self, pool: ConnectionPool, *, at_most: int, timeout_s: float) -> None:
        self._pool = pool
        self._sentinels = pool if isinstance(pool, SentinelConnectionPool) else None
        self._timeout_s = timeout_s
        self._all: list[Connection] = []
        self._free: list[tuple[Connection, Patience]] = []
        self._turns = asyncio.Semaphore(at_most)
        self._closed = False

    async def execute(self, commands: Sequence[tuple[Argument, ...]]) -> list[Any]:
        """The answers to commands that are sent together; an exception in the place of each that Redis refuses.

        Raises what redis-py raises where a connection fails.
        """
        await self._take_turn()
        try:
            if self._closed:
                raise Disconnected("the connections to Redis are closed")
            connection, patience = self._free.pop() if self._free else self._new()
            try:
                answers = await self._ask(connection, patience, commands)
                if self._closed or any(_is_of_the_place(each) for each in answers):
                    await connection.disconnect(nowait=True)
            except BaseException:
                await connection.disconnect(nowait=True)
                raise
            finally:
                self._free.append((connection, patience))
        finally:
            self._turns.release()
        return answers

    async def _ask(
        self, connection: Connection, patience: Patience, commands: Sequence[tuple[Argument, ...]]
    ) -> list[Any]:
        # the stub means a tuple of any length
        packed = [hiredis.pack_command(each) for each in commands]  # type: ignore[arg-type]
        size = sum(map(len, packed))
        with patience:
            if self._sentinels is not None and self._sentinels.master_address != (connection.host, connection.port):
                await connection.disconnect(nowait=True)  # the master of before may live on, and take what is lost
            await self._pool.ensure_connection(connection)
            if size <= PIECE_BYTES:
                await connection.send_packed_command(packed, check_health=False)
                return [await _answer(connection) for _ in packed]
        for piece in _pieces(packed):  # a slow line is no silence
            with patience:
                await connection.send_packed_command(piece, check_health=False)
        with Patience(self._timeout_s * (1 + size // BUFFERED_BYTES)):
            return [await _answer(connection) for _ in packed]

    async def _take_turn(self) -> None:
        if not self._turns.locked():
            await self._turns.acquire()
            return
        async with asyncio.timeout(self._timeout_s):
            await self._turns.acquire()

    def _new(self) -> tuple[Connection, Patience]:
        connection: Connection = self._pool.make_connection()  # type: ignore[no-untyped-call]
        connection.socket_timeout = None  # patience takes less time
        self._all.append(connection)
        return connection, Patience(self._timeout_s)

    async def close(self) -> None:
        """Closes the connections, those in use too."""
        self._closed = True
        # a Redis that is stalled does not take part in the end of TLS, and then there is nothing more to do
        await asyncio.gather(*(each.disconnect() for each in self._all), return_exceptions=True)


def _pieces(packed: Sequence[bytes]) -> Iterator[bytes]:
    for command in packed:
        for start in range(0, len(command), PIECE_BYTES):
            yield command[start : start + PIECE_BYTES]


async def _answer(connection: Connection) -> Any:
    try:
        return await connection.read_response()
    except ResponseError as error:
        return error


def _is_of_the_place(answer: object) -> bool:
    """Whether an error may be one of the place: a master of before refuses to write, and another is found anew."""
    return isinstance(answer, ResponseError) and not isinstance(answer, NoScriptError)
