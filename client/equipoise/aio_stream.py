"""The asyncio client's stream: a task that opens it, reads it, and opens it again."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from time import monotonic
from typing import Any

import grpc

from equipoise import errors
from equipoise.link import Opening
from equipoise.results import StepResult
from equipoise.route import Route
from equipoise.session import PROBE_SECONDS, Session
from equipoise.v1 import policy_pb2 as pb
from equipoise.v1.policy_pb2_grpc import PolicyServiceStub
from equipoise.window import Ticket

logger = logging.getLogger("equipoise")


class _Signal:
    """Wakes all who wait for a change."""

    def __init__(self) -> None:
        self._waiters: set[asyncio.Future[None]] = set()

    def notify(self) -> None:
        """Something has changed."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def wait(self, timeout: float | None) -> None:
        """Waits for a change, at most so many seconds."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await waiter
        finally:
            self._waiters.discard(waiter)


class Stream:
    """Carries one session over one channel, or over a new one to another server or after certificates were replaced.

    Args:
        session: the session.
        route: the servers.
    """

    def __init__(self, session: Session, route: Route) -> None:
        self._session = session
        self._route = route
        self._open_channel()
        self._work = _Signal()
        self._answers = _Signal()
        self._call: Any = None
        self._task = asyncio.get_running_loop().create_task(self._run(), name="equipoise-stream")

    def notify(self) -> None:
        """The session has something to do."""
        self._work.notify()

    async def settle(self, ticket: Ticket) -> StepResult:
        """Waits until a ticket is settled or has expired."""
        self._work.notify()
        # While the server is lost answers are there at once: even then a loop of steps must let its stream reconnect.
        await asyncio.sleep(0)
        while not ticket.settled and (rest := ticket.deadline - monotonic()) > 0:
            await self._answers.wait(rest)
        self._session.expire(ticket, monotonic())
        return ticket.value()

    async def flush(self, timeout: float, *, durable: bool) -> bool:
        """Waits until every step is answered (and durable); whether that is so."""
        end = monotonic() + timeout
        probe_at = 0.0
        while not self._session.flushed(durable=durable) and (rest := end - (now := monotonic())) > 0:
            if durable and now >= probe_at:
                self._session.probe(now)
                self._work.notify()
                probe_at = now + PROBE_SECONDS
            await self._answers.wait(min(rest, PROBE_SECONDS))
        return self._session.flushed(durable=durable)

    async def close(self, timeout: float) -> None:
        """Ends the stream, within the timeout."""
        self._session.fail(errors.ClientClosedError("the client was closed"), monotonic())
        self._notify_all()
        self._task.cancel()
        await asyncio.wait([self._task], timeout=timeout)
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._channel.close()

    def _notify_all(self) -> None:
        self._work.notify()
        self._answers.notify()

    async def _run(self) -> None:
        while (opening := await self._next_opening()) is not None:
            error: errors.EquipoiseError | None = None
            try:
                await self._converse(opening)
            except grpc.RpcError as failure:
                error = errors.from_rpc(failure, address=self._address)
            except errors.EquipoiseError as failure:
                error = failure
            except asyncio.CancelledError:
                if asyncio.current_task().cancelling():  # type: ignore[union-attr]  # there is one: this
                    raise
                # A call that ended with CANCELLED, by the peer or by our watchdog, looks like a cancelled task.
                error = errors.UnavailableError(f"{self._address}: the stream was cancelled")
            except Exception:
                logger.exception("%s: a bug in the client ended its stream", self._address)
                error = errors.EquipoiseError(f"{self._address}: a bug in the client ended its stream")
            self._route.turn(error)
            self._session.ended(error, monotonic())
            self._notify_all()

    def _open_channel(self) -> None:
        self._server = self._route.server
        self._address = self._server.address
        self._certificates = self._server.security.stamp()
        self._channel = self._server.aio_channel()
        self._stub: Any = PolicyServiceStub(self._channel)

    async def _next_opening(self) -> Opening | None:
        while self._session.failure is None:
            at = self._session.connect_at
            now = monotonic()
            if at is not None and at <= now:
                return self._session.begin()
            await self._work.wait(None if at is None else at - now)
        return None

    async def _converse(self, opening: Opening) -> None:
        timeout = self._session.options.timeout.connect
        if self._server != self._route.server or self._certificates != self._server.security.stamp():
            await self._channel.close()
            self._open_channel()
        metadata = self._server.headers(self._session.options.spec.name)
        if opening.create is not None:
            await self._stub.CreatePolicy(opening.create, timeout=timeout, metadata=metadata)
        if opening.asks_limits:
            info = await self._stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=timeout, metadata=metadata)
            self._session.limit(info.max_batch_examples)
        call = self._stub.Exchange(self._messages(opening.generation), metadata=metadata)
        # A server that takes the stream and says nothing must not hold it for ever.
        watchdog = asyncio.get_running_loop().call_later(timeout, self._cancel_unopened, call, opening.generation)
        try:
            async for message in call:
                self._session.received(message, monotonic())
                self._notify_all()
                if self._session.left:
                    return
        finally:
            watchdog.cancel()
            call.cancel()
        raise errors.UnavailableError(f"{self._address}: the server ended the stream")

    async def _messages(self, generation: int) -> AsyncIterator[pb.ExchangeRequest]:
        while True:
            while (message := self._session.next_message(generation)) is None:
                if self._session.is_void(generation):
                    return
                await self._work.wait(None)
            yield message

    def _cancel_unopened(self, call: Any, generation: int) -> None:
        if self._session.is_opening(generation):
            call.cancel()
