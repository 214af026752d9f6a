"""The sync client's stream: a thread that opens it, reads it, and opens it again."""

import logging
import threading
from collections.abc import Iterator
from functools import partial
from time import monotonic
from typing import Any

import grpc

from equipoise import errors
from equipoise.channel import Channels, Server
from equipoise.link import Opening
from equipoise.route import Route
from equipoise.session import PROBE_SECONDS, Session
from equipoise.tickets import Ticket
from equipoise.v1 import policy_pb2 as pb
from equipoise.waiters import Waiters

logger = logging.getLogger("equipoise")


class Stream:
    """Carries one session over one stream after another.

    Args:
        session: the session.
        route: the servers.
        channels: the client's channels.
        lock: held for every use of the session.
    """

    def __init__(self, session: Session, route: Route, channels: Channels, *, lock: threading.Lock) -> None:
        self._session = session
        self._route = route
        self._channels = channels
        self._call: Any = None
        self._lock = lock
        self._waiters = Waiters(lock)
        self._thread = threading.Thread(target=self._run, name="equipoise-stream", daemon=True)
        self._thread.start()

    def notify(self) -> None:
        """The session has changed. The caller holds the lock."""
        self._waiters.notify()

    def wait(self, ticket: Ticket) -> None:
        """Waits until a ticket is settled or has expired. The caller holds the lock."""
        if not self._waiters.wait_for(lambda: ticket.settled, ticket.deadline - monotonic()):
            self._session.expire(ticket, monotonic())

    def flush(self, timeout: float, *, durable: bool) -> bool:
        """Waits until every step is answered (and durable); whether that is so. The caller holds the lock."""
        end = monotonic() + timeout
        probe_at = 0.0
        while not self._session.flushed(durable=durable) and (rest := end - (now := monotonic())) > 0:
            if durable and now >= probe_at:
                self._session.probe(now)
                self._waiters.notify()
                probe_at = now + PROBE_SECONDS
            self._waiters.wait_for(lambda: self._session.flushed(durable=durable), min(rest, PROBE_SECONDS))
        return self._session.flushed(durable=durable)

    def close(self, timeout: float) -> None:
        """Ends the stream, within the timeout."""
        with self._lock:
            if self._session.failure is None:
                self._session.fail(errors.ClientClosedError(), monotonic())
            self._waiters.notify()
            if self._call is not None:
                self._call.cancel()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def _run(self) -> None:
        try:
            self._keep_open()
        except Exception:  # nobody else would hear of it: steps would wait, or go on without a server, for ever
            logger.exception("a bug in the client ended it")
            with self._lock:
                self._session.fail(errors.EquipoiseError("a bug in the client ended it; see the log"), monotonic())
                self._waiters.notify()

    def _keep_open(self) -> None:
        while (opening := self._next_opening()) is not None:
            error: errors.EquipoiseError | None = None
            server = self._route.server
            try:
                with self._channels.stub(server) as stub:
                    self._converse(opening, server, stub)
            except grpc.RpcError as failure:
                error = errors.from_rpc(failure, address=server.address)
            except errors.EquipoiseError as failure:
                error = failure
            except Exception:
                logger.exception("%s: a bug in the client ended its stream", server.address)
                error = errors.EquipoiseError(f"{server.address}: a bug in the client ended its stream")
            self._ended(error, server)

    def _next_opening(self) -> Opening | None:
        with self._lock:
            while self._session.failure is None:
                at = self._session.connect_at
                now = monotonic()
                if at is not None and at <= now:
                    return self._session.begin()
                self._waiters.wait_for(partial(self._session.replans, at), None if at is None else at - now)
        return None

    def _converse(self, opening: Opening, server: Server, stub: Any) -> None:
        timeout = self._session.options.timeout.connect
        metadata = self._route.headers(server, self._session.options.spec.name)
        if opening.create is not None:
            stub.CreatePolicy(opening.create, timeout=timeout, metadata=metadata)
        call = stub.Exchange(self._messages(opening.generation), metadata=metadata)
        with self._lock:
            self._call = call
            if self._session.failure is not None:
                call.cancel()
        # A server that takes the stream and says nothing must not hold it for ever.
        watchdog = threading.Timer(timeout, self._cancel_unopened, (opening.generation,))
        watchdog.daemon = True
        watchdog.start()
        try:
            for message in call:
                with self._lock:
                    self._session.received(message, monotonic())
                    self._waiters.notify()
                    if self._session.left:
                        return
        finally:
            watchdog.cancel()
            call.cancel()
        raise errors.UnavailableError(f"{server.address}: the server ended the stream")

    def _messages(self, generation: int) -> Iterator[pb.ExchangeRequest]:
        while True:
            with self._lock:
                self._waiters.wait_for(lambda: self._session.has_message(generation))
                message = self._session.next_message(generation)
            if message is None:
                return
            yield message

    def _cancel_unopened(self, generation: int) -> None:
        with self._lock:
            if self._session.is_opening(generation) and self._call is not None:
                self._call.cancel()

    def _ended(self, error: errors.EquipoiseError | None, server: Server) -> None:
        with self._lock:
            self._call = None
            self._route.turn(error, asked=server, answered=self._session.is_open)
            self._session.ended(error, monotonic())
            self._waiters.notify()
