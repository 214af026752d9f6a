"""The short way to Redis, for what steps wait for: connections without a client's work around each command.

Around a command redis-py's client waits for a place in its pool, starts four timers and a task, and keeps records:
that takes more time than Redis does for a step. Its connections are used all the same: they find the master through
Sentinels, enter with TLS and credentials, and read answers.
"""

import asyncio
from collections.abc import Sequence
from typing import Any, TypeAlias

import hiredis
from redis.asyncio import Connection, ConnectionPool
from redis.exceptions import NoScriptError, ResponseError

from equipoise_server.patience import Patience

Argument: TypeAlias = str | bytes | int | float


class DirectConnections:
    """Runs commands on connections of its own, one command or run of commands at a time on each.

    A failure closes its connection, and so does a call that is cancelled or takes too long; the next command opens it
    anew, at the master of then.

    Args:
        pool: makes the connections, whose `socket_timeout` is None; it keeps none of them.
        at_most: connections at once; further commands wait.
        timeout_s: longest wait for a connection, and for it to be opened and to answer.
    """

    def __init__(self, pool: ConnectionPool, *, at_most: int, timeout_s: float) -> None:
        self._pool = pool
        self._timeout_s = timeout_s
        self._free: list[tuple[Connection, Patience]] = []
        self._turns = asyncio.Semaphore(at_most)

    async def execute(self, commands: Sequence[tuple[Argument, ...]]) -> list[Any]:
        """The answers to commands that are sent together; an exception in the place of each that Redis refuses.

        Raises what redis-py raises where a connection fails.
        """
        await self._take_turn()
        connection, patience = self._free.pop() if self._free else (self._new(), Patience(self._timeout_s))
        answers: list[Any] = []
        try:
            with patience:
                await self._pool.ensure_connection(connection)
                await connection.send_packed_command(_packed(commands), check_health=False)
                for _ in commands:
                    answers.append(await _answer(connection))
            if any(_is_of_the_place(each) for each in answers):
                await connection.disconnect(nowait=True)
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        finally:
            self._free.append((connection, patience))
            self._turns.release()
        return answers

    async def _take_turn(self) -> None:
        if not self._turns.locked():
            await self._turns.acquire()
            return
        async with asyncio.timeout(self._timeout_s):
            await self._turns.acquire()

    def _new(self) -> Connection:
        connection: Connection = self._pool.make_connection()  # type: ignore[no-untyped-call]
        return connection

    async def close(self) -> None:
        """Closes the connections."""
        while self._free:
            connection, _ = self._free.pop()
            await connection.disconnect()


def _packed(commands: Sequence[tuple[Argument, ...]]) -> list[bytes]:
    # its stub means a tuple of any length
    return [hiredis.pack_command(each) for each in commands]  # type: ignore[arg-type]


async def _answer(connection: Connection) -> Any:
    try:
        return await connection.read_response()
    except ResponseError as error:
        return error


def _is_of_the_place(answer: object) -> bool:
    """Whether an error may be one of the place: a master of before refuses to write, and another is found anew."""
    return isinstance(answer, ResponseError) and not isinstance(answer, NoScriptError)
