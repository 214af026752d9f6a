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

Argument: TypeAlias = str | bytes | int | float


class DirectConnections:
    """Runs commands on connections of its own, one command or run of commands at a time on each.

    Nothing here is bounded in time: the caller does it, and a call that is cancelled closes its connection. So does any
    other failure; the next command opens it anew, at the master of then.

    Args:
        pool: makes the connections, whose `socket_timeout` is None; it keeps none of them.
        at_most: connections at once; further commands wait.
    """

    def __init__(self, pool: ConnectionPool, *, at_most: int) -> None:
        self._pool = pool
        self._free: list[Connection] = []
        self._turns = asyncio.Semaphore(at_most)

    async def execute(self, commands: Sequence[tuple[Argument, ...]]) -> list[Any]:
        """The answers to commands that are sent together; an exception in the place of each that Redis refuses.

        Raises what redis-py raises where a connection fails.
        """
        async with self._turns:
            connection = self._free.pop() if self._free else self._new()
            answers: list[Any] = []
            try:
                await self._pool.ensure_connection(connection)
                await connection.send_packed_command(_packed(commands), check_health=False)
                for _ in commands:
                    answers.append(await _answer(connection))
            except BaseException:
                await connection.disconnect(nowait=True)
                raise
            finally:
                self._free.append(connection)
            if any(_says_more(each) for each in answers):
                await connection.disconnect(nowait=True)
            return answers

    def _new(self) -> Connection:
        connection: Connection = self._pool.make_connection()  # type: ignore[no-untyped-call]
        return connection

    async def close(self) -> None:
        """Closes the connections."""
        while self._free:
            await self._free.pop().disconnect()


def _packed(commands: Sequence[tuple[Argument, ...]]) -> list[bytes]:
    # its stub means a tuple of any length
    return [hiredis.pack_command(each) for each in commands]  # type: ignore[arg-type]


async def _answer(connection: Connection) -> Any:
    try:
        return await connection.read_response()
    except ResponseError as error:
        return error


def _says_more(answer: object) -> bool:
    """Whether an error may be one of the place: a master of before refuses to write, and another is found anew."""
    return isinstance(answer, ResponseError) and not isinstance(answer, NoScriptError)
