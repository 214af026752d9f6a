"""One way to Redis: every command is timed, counted, bounded in time and its failures told apart."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any, TypeAlias

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import PipelineCommand
from redis.exceptions import NoScriptError, ResponseError

from equipoise_server.store.direct import Argument, DirectConnections
from equipoise_server.store.errors import Damaged, Deleted, Fenced, Interrupted, LogLost, NotFound, TooNew, Unavailable
from equipoise_server.store.faults import REDIS_FAULTS, as_unavailable, was_unsent
from equipoise_server.store.observer import NoObserver, Observer
from equipoise_server.store.scripts import Script

Client: TypeAlias = Redis | RedisCluster
"""What `connect` makes of a URL; it answers with bytes."""

WAIT_SHARE = 0.6
"""Of the time for an answer: how long Redis may wait for its replicas."""


class Commands:
    """Runs commands and scripts on a client; failures are `Unavailable`, refusals of scripts errors of their own."""

    def __init__(
        self,
        client: Client,
        *,
        timeout_s: float,
        observer: Observer | None = None,
        at_once: AbstractAsyncContextManager[object] | None = None,
        direct: DirectConnections | None = None,
    ) -> None:
        """Prepare.

        Args:
            client: runs the commands.
            timeout_s: about half of the longest time that one may take.
            observer: told of each, and of errors.
            at_once: surrounds each command, for instance a semaphore: waiting for it is not timed.
            direct: a shorter way for single commands and scripts; it bounds their time itself.
        """
        self._client = client
        self._direct = direct
        self._at_once = at_once or nullcontext()
        self._timeout_s = timeout_s
        self._observer: Observer = observer or NoObserver()

    async def run(self, name: str, *arguments: Argument) -> Any:
        """One command of Redis, counted under `name`."""
        return await self._timed(name, lambda: self._execute(arguments))

    async def run_together(self, name: str, commands: Sequence[tuple[Argument, ...]]) -> list[Any]:
        """Several independent commands in one round trip (per node); not atomic."""
        pipeline = self._client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        return list(await self._timed(name, pipeline.execute))

    async def scan(self, pattern: str, *, count: int) -> list[bytes]:
        """All keys that match a pattern, on all nodes, without holding Redis up; takes as long as it takes."""
        try:
            return [key async for key in self._client.scan_iter(match=pattern, count=count)]
        except REDIS_FAULTS as fault:
            raise as_unavailable(fault, command="scan") from fault

    async def script(
        self,
        name: str,
        script: Script,
        *,
        policy: str,
        keys: Sequence[str],
        arguments: Sequence[Argument] = (),
        replicas: int = 0,
    ) -> list[Any]:
        """Run a script and return what follows its OK; any other word is raised.

        With `replicas`, so many must have what it has written: else it raises Unavailable (`replicas`).
        """

        async def evaluate() -> Any:
            try:
                return await self._evaluate(("EVALSHA", script.sha, len(keys), *keys, *arguments), replicas, keys[0])
            except NoScriptError:
                return await self._evaluate(("EVAL", script.source, len(keys), *keys, *arguments), replicas, keys[0])

        answer = await self._timed(name, evaluate)
        word, details = answer[0].decode(), answer[1:]
        if word in ("OK", "HELD"):
            return [word, *details]
        raise self._refusal(policy, word, details)

    async def wait_replicas(self, name: str, *, key: str, replicas: int) -> None:
        """Return once so many replicas have all that was written until now where a key is.

        Raises Unavailable (`replicas`) when they have it not in time.
        """
        await self._timed(name, lambda: self._wait_replicas(key, replicas))

    async def _evaluate(self, command: tuple[Argument, ...], replicas: int, key: str) -> Any:
        if not replicas or isinstance(self._client, RedisCluster):
            answer = await self._execute(command)
            if replicas:
                await self._wait_replicas(key, replicas)
            return answer
        answer, reached = await self._on_one_connection(command, self._wait(replicas))
        self._check_replicas(reached, replicas)
        return answer

    async def _execute(self, command: tuple[Argument, ...]) -> Any:
        if self._direct is None:
            return await self._client.execute_command(*command)
        (answer,) = await self._direct.execute([command])
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def _wait_replicas(self, key: str, replicas: int) -> None:
        """WAIT asks for what its connection has seen: the PING before it has seen all of now."""
        _, reached = await self._on_one_connection(("PING",), self._wait(replicas), key=key)
        self._check_replicas(reached, replicas)

    async def _on_one_connection(self, *commands: tuple[Argument, ...], key: str = "") -> list[Any]:
        answers: Sequence[Any]
        if self._direct is not None:
            answers = await self._direct.execute(commands)
        elif not isinstance(self._client, RedisCluster):
            pipeline = self._client.pipeline(transaction=False)
            for command in commands:
                pipeline.execute_command(*command)
            answers = await pipeline.execute(raise_on_error=False)
        else:
            await self._client.initialize()
            node = self._client.get_node_from_key(key)
            assert node is not None, "a slot's master is asked for"
            asked = [PipelineCommand(place, *command) for place, command in enumerate(commands)]
            await node.execute_pipeline(asked)
            answers = [each.result for each in asked]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return list(answers)

    def _wait(self, replicas: int) -> tuple[Argument, ...]:
        """Ends before the connection takes the silence for a failure."""
        return "WAIT", replicas, max(1, round(1000 * WAIT_SHARE * self._timeout_s))

    @staticmethod
    def _check_replicas(reached: int, replicas: int) -> None:
        if reached < replicas:
            raise Unavailable(
                f"{reached} of the {replicas} replicas of redis_wait_replicas have what was written", kind="replicas"
            )

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
        if word == "REFUSED":
            command, text = (str(detail, errors="replace") for detail in details)
            error = as_unavailable(ResponseError(f"{text} (in a script, {command})"), command=command)
            self._observer.error(error.kind)
            return error
        if word == "GONE":
            self._observer.error("lost")
            return Damaged(policy, what=str(details[0], "ascii"), why="Redis does not have it any more")
        if word == "NEWER":
            return TooNew(policy, found=int(details[0]))
        return Interrupted(f"policy {policy!r}: another write of a page took over")

    async def _timed(self, name: str, call: Callable[[], Awaitable[Any]]) -> Any:
        async with self._at_once:
            return await self._run_timed(name, call)

    async def _run_timed(self, name: str, call: Callable[[], Awaitable[Any]]) -> Any:
        started = time.perf_counter()
        try:
            if self._direct is not None:
                return await _with_second_try(call)
            # The client's own timeouts are per connection, write and read: this one bounds their sum.
            async with asyncio.timeout(2 * self._timeout_s):
                return await _with_second_try(lambda: _heeding_cancellation(call()))
        except Unavailable as lacking:
            self._observer.error(lacking.kind)
            raise
        except REDIS_FAULTS as fault:
            error = as_unavailable(fault, command=name)
            self._observer.error(error.kind)
            raise error from fault
        finally:
            self._observer.command(name, time.perf_counter() - started)


async def _with_second_try(call: Callable[[], Awaitable[Any]]) -> Any:
    try:
        return await call()
    except REDIS_FAULTS as fault:
        if not was_unsent(fault):
            raise
    # Redis has restarted since the connection was used: it is opened anew, as any idle one is.
    return await call()


async def _heeding_cancellation(call: Awaitable[Any]) -> Any:
    """Await the client, but lose no cancellation: before Python 3.12 the `wait_for` it uses may swallow one."""
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    answer = await call
    if task and task.cancelling() > before:
        raise asyncio.CancelledError
    return answer
