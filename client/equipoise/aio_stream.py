"""The asyncio client's stream: a task that opens it, reads it, and opens it again."""

import asyncio
import logging
from collections.abc import AsyncIterator
from functools import partial
from time import monotonic
from typing import Any

import grpc

from equipoise import errors
from equipoise.channel import AioChannels, Server
from equipoise.link import Opening
from equipoise.results import StepResult
from equipoise.route import Route
from equipoise.session import PROBE_SECONDS, Session
from equipoise.tickets import Ticket
from equipoise.v1 import policy_pb2 as pb
from equipoise.waiters import AioWaiters

logger = logging.getLogger("equipoise")


class Stream:
    """Carries one session over one stream after another.

    Args:
        session: the session.
        route: the servers.
        channels: the client's channels.
    """

    def __init__(self, session: Session, route: Route, channels: AioChannels) -> None:
        self._session = session
        self._route = route
        self._channels = channels
        self._waiters = AioWaiters()
        self._call: Any = None
        self._task = asyncio.get_running_loop().create_task(self._run(), name="equipoise-stream")

    def notify(self) -> None:
        """The session has changed."""
        self._waiters.notify()

    async def settle(self, ticket: Ticket) -> StepResult:
        """Waits until a ticket is settled or has expired."""
        self._waiters.notify()
        # While the server is lost answers are there at once: even then a loop of steps must let its stream reconnect.
        await asyncio.sleep(0)
        if not await self._waiters.wait_for(lambda: ticket.settled, ticket.deadline - monotonic()):
            self._session.expire(ticket, monotonic())
        return ticket.value()

    async def flush(self, timeout: float, *, durable: bool) -> bool:
        """Waits until every step is answered (and durable); whether that is so."""
        end = monotonic() + timeout
        probe_at = 0.0
        while not self._session.flushed(durable=durable) and (rest := end - (now := monotonic())) > 0:
            if durable and now >= probe_at:
                self._session.probe(now)
                self._waiters.notify()
                probe_at = now + PROBE_SECONDS
            await self._waiters.wait_for(lambda: self._session.flushed(durable=durable), min(rest, PROBE_SECONDS))
        return self._session.flushed(durable=durable)

    async def close(self, timeout: float) -> None:
        """Ends the stream, within the timeout."""
        self._session.fail(errors.ClientClosedError(), monotonic())
        self._waiters.notify()
        self._task.cancel()
        await asyncio.wait([self._task], timeout=timeout)

    async def _run(self) -> None:
        try:
            await self._keep_open()
        except Exception:  # nobody else would hear of it: steps would wait, or go on without a server, for ever
            logger.exception("a bug in the client ended it")
            self._session.fail(errors.EquipoiseError("a bug in the client ended it; see the log"), monotonic())
            self._waiters.notify()

    async def _keep_open(self) -> None:
        while (opening := await self._next_opening()) is not None:
            error: errors.EquipoiseError | None = None
            server = self._route.server
            try:
                async with self._channels.stub(server) as stub:
                    await self._converse(opening, server, stub)
            except grpc.RpcError as failure:
                error = errors.from_rpc(failure, address=server.address)
            except errors.EquipoiseError as failure:
                error = failure
            except asyncio.CancelledError:
                if asyncio.current_task().cancelling():  # type: ignore[union-attr]  # there is one: this
                    raise
                # A call that ended with CANCELLED, by the peer or by our watchdog, looks like a cancelled task.
                error = errors.UnavailableError(f"{server.address}: the stream was cancelled")
            except Exception:
                logger.exception("%s: a bug in the client ended its stream", server.address)
                error = errors.EquipoiseError(f"{server.address}: a bug in the client ended its stream")
            self._route.turn(error, asked=server, answered=self._session.is_open)
            self._session.ended(error, monotonic())
            self._waiters.notify()

    async def _next_opening(self) -> Opening | None:
        while self._session.failure is None:
            at = self._session.connect_at
            now = monotonic()
            if at is not None and at <= now:
                return self._session.begin()
            await self._waiters.wait_for(partial(self._session.replans, at), None if at is None else at - now)
        return None

    async def _converse(self, opening: Opening, server: Server, stub: Any) -> None:
        timeout = self._session.options.timeout.connect
        metadata = self._route.headers(server, self._session.options.spec.name)
        if opening.create is not None:
            await stub.CreatePolicy(opening.create, timeout=timeout, metadata=metadata)
        call = stub.Exchange(self._messages(opening.generation), metadata=metadata)
        # A server that takes the stream and says nothing must not hold it for ever.
        watchdog = asyncio.get_running_loop().call_later(timeout, self._cancel_unopened, call, opening.generation)
        try:
            async for message in call:
                self._session.received(message, monotonic())
                self._waiters.notify()
                if self._session.left:
                    return
        finally:
            watchdog.cancel()
            call.cancel()
        raise errors.UnavailableError(f"{server.address}: the server ended the stream")

    async def _messages(self, generation: int) -> AsyncIterator[pb.ExchangeRequest]:
        while True:
            await self._waiters.wait_for(lambda: self._session.has_message(generation))
            if (message := self._session.next_message(generation)) is None:
                return
            yield message

    def _cancel_unopened(self, call: Any, generation: int) -> None:
        if self._session.is_opening(generation):
            call.cancel()
