"""The HTTP side door: `/metrics` for Prometheus and `/healthz` for whoever restarts or balances."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from http import HTTPStatus

from equipoise_server.metrics.server import Metrics
from equipoise_server.metrics.status import ServerStatus
from equipoise_server.settings import host_and_port

REQUEST_TIMEOUT_S = 5.0
MAX_HEADER_BYTES = 16 * 1024
PLAIN = "text/plain; charset=utf-8"

logger = logging.getLogger(__name__)


class Endpoint:
    """Answers one GET per connection, on the event loop that owns what is measured.

    The status is taken on the loop, where nothing moves meanwhile; the text is made in a thread.
    """

    def __init__(
        self, metrics: Metrics, *, status: Callable[[], ServerStatus], problems: Callable[[], Sequence[str]]
    ) -> None:
        self._metrics = metrics
        self._status = status
        self._problems = problems
        self._server: asyncio.Server | None = None

    async def start(self, address: str) -> str:
        """Listens on `HOST:PORT` (port 0: a free one) and returns the address that was bound.

        Raises OSError when the address is taken.
        """
        host, port = host_and_port(address)
        self._server = await asyncio.start_server(self._connected, host or None, port, limit=MAX_HEADER_BYTES)
        bound_host, bound_port, *_ = self._server.sockets[0].getsockname()
        return f"[{bound_host}]:{bound_port}" if ":" in bound_host else f"{bound_host}:{bound_port}"

    async def stop(self) -> None:
        """Stops listening; answers under way are finished."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                status, content_type, body = await self._answer(reader)
                writer.write(
                    f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {content_type}\r\n"
                    f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode("ascii")
                )
                writer.write(body)
                await writer.drain()
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader) -> tuple[HTTPStatus, str, bytes]:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            method, target, _ = head.partition("\r\n")[0].split(" ")
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError):
            return HTTPStatus.BAD_REQUEST, PLAIN, b"not an HTTP request that this server takes\n"
        if method != "GET":
            return HTTPStatus.METHOD_NOT_ALLOWED, PLAIN, b"GET only\n"
        match target.partition("?")[0]:
            case "/metrics":
                return await self._render(head)
            case "/healthz":
                problems = self._problems()
                status = HTTPStatus.SERVICE_UNAVAILABLE if problems else HTTPStatus.OK
                return status, PLAIN, ("; ".join(problems) or "ok").encode() + b"\n"
            case _:
                return HTTPStatus.NOT_FOUND, PLAIN, b"here are /metrics and /healthz\n"

    async def _render(self, head: str) -> tuple[HTTPStatus, str, bytes]:
        fields = (line.partition(":") for line in head.split("\r\n")[1:])
        accept = ",".join(value.strip() for name, _, value in fields if name.lower() == "accept")
        try:
            self._metrics.scrape(self._status)
            body, content_type = await asyncio.to_thread(self._metrics.exposition, accept)
        except Exception:
            logger.exception("the metrics could not be read")
            return HTTPStatus.INTERNAL_SERVER_ERROR, PLAIN, b"the metrics could not be read; see the log\n"
        return HTTPStatus.OK, content_type, body
