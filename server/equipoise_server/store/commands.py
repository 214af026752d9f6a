"""One way to Redis: every command is timed, counted, bounded in time and its failures told apart."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias

from redis.asyncio import Redis, RedisCluster
from redis.exceptions import NoScriptError

from equipoise_server.store.errors import Deleted, Fenced, Interrupted, LogLost, NotFound
from equipoise_server.store.faults import REDIS_FAULTS, as_unavailable
from equipoise_server.store.observer import NoObserver, Observer
from equipoise_server.store.scripts import Script

Client: TypeAlias = Redis | RedisCluster
"""What `connect` makes of a URL; it answers with bytes."""

Argument: TypeAlias = str | bytes | int | float


class Commands:
    """Runs commands and scripts on a client; failures are `Unavailable`, refusals of scripts errors of their own."""

    def __init__(self, client: Client, *, timeout_s: float, observer: Observer | None = None) -> None:
        self._client = client
        self._timeout_s = timeout_s
        self._observer: Observer = observer or NoObserver()

    async def run(self, name: str, *arguments: Argument) -> Any:
        """One command of Redis, counted under `name`."""
        return await self._timed(name, lambda: self._client.execute_command(*arguments))

    async def run_together(self, name: str, commands: Sequence[tuple[Argument, ...]]) -> list[Any]:
        """Several independent commands in one round trip (per node); not atomic."""
        pipeline = self._client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        return list(await self._timed(name, pipeline.execute))

    async def script(
        self, name: str, script: Script, *, policy: str, keys: Sequence[str], arguments: Sequence[Argument] = ()
    ) -> list[Any]:
        """Run a script and return what follows its OK; any other word is raised."""

        async def evaluate() -> Any:
            try:
                return await self._client.execute_command("EVALSHA", script.sha, len(keys), *keys, *arguments)
            except NoScriptError:
                return await self._client.execute_command("EVAL", script.source, len(keys), *keys, *arguments)

        answer = await self._timed(name, evaluate)
        word, details = answer[0].decode(), answer[1:]
        if word in ("OK", "HELD"):
            return [word, *details]
        raise self._refusal(policy, word, details)

    def _refusal(self, policy: str, word: str, details: Sequence[Any]) -> Exception:
        if word == "LOST":
            self._observer.error("lost")
            return LogLost(policy, last_version=details[0] if details[0] >= 0 else None)
        if word in ("FENCED", "DELETED"):
            self._observer.error("fenced")
            if word == "DELETED":
                return Deleted(f"policy {policy!r} was deleted")
            return Fenced(f"policy {policy!r} has another owner" + (f", epoch {int(details[0])}" if details else ""))
        if word == "MISSING":
            return NotFound(f"no policy {policy!r}")
        return Interrupted(f"policy {policy!r}: another write of a page took over")

    async def _timed(self, name: str, call: Callable[[], Awaitable[Any]]) -> Any:
        started = time.perf_counter()
        try:
            # The client's own timeouts are per connection, write and read: this one bounds their sum.
            async with asyncio.timeout(2 * self._timeout_s):
                return await _heeding_cancellation(call())
        except REDIS_FAULTS as fault:
            error = as_unavailable(fault, command=name)
            self._observer.error(error.kind)
            raise error from fault
        finally:
            self._observer.command(name, time.perf_counter() - started)


async def _heeding_cancellation(call: Awaitable[Any]) -> Any:
    """Await the client, but lose no cancellation: before Python 3.12 the `wait_for` it uses may swallow one."""
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    answer = await call
    if task and task.cancelling() > before:
        raise asyncio.CancelledError
    return answer
