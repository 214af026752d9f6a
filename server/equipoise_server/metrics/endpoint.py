"""The HTTP side door, without TLS: `/metrics` for Prometheus, `/livez` and `/readyz` for those who watch servers."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import TypeAlias

from equipoise_server.addresses import bindable, host_and_port, joined

REQUEST_TIMEOUT_S = 5.0
MAX_HEADER_BYTES = 16 * 1024
PLAIN = "text/plain; charset=utf-8"

Checks: TypeAlias = Mapping[str, str]
"""What has to be well, by name, and why it is not; empty: it is well."""

logger = logging.getLogger(__name__)


async def event_loop_turns() -> Checks:
    """That it says this is all there is to it."""
    return {"event-loop": ""}


class Endpoint:
    """Answers one GET per connection, on the event loop that owns what is measured.

    That event loops answer is all that `/livez` says: a server whose Redis is gone, or that loads for minutes, is not
    to be restarted.

    Args:
        metrics: the page of `/metrics` in the format that an `Accept` header asks for, and its content type.
        ready: what has to be well for the server to be ready.
        alive: what has to be well for it to be left alone.
    """

    def __init__(
        self,
        metrics: Callable[[str], Awaitable[tuple[bytes, str]]],
        *,
        ready: Callable[[], Awaitable[Checks]],
        alive: Callable[[], Awaitable[Checks]] = event_loop_turns,
    ) -> None:
        self._metrics = metrics
        self._ready = ready
        self._alive = alive
        self._server: asyncio.Server | None = None

    async def start(self, address: str) -> str:
        """Listens on `HOST:PORT` (port 0: a free one) and returns the address that was bound.

        Raises OSError when the address is taken.
        """
        host, port = host_and_port(bindable(address))
        if host == "::":  # asyncio would take IPv6 alone
            both = socket.create_server((host, port), family=socket.AF_INET6, dualstack_ipv6=True)
            self._server = await asyncio.start_server(self._connected, sock=both, limit=MAX_HEADER_BYTES)
        else:
            self._server = await asyncio.start_server(self._connected, host, port, limit=MAX_HEADER_BYTES)
        bound_host, bound_port, *_ = self._server.sockets[0].getsockname()
        return joined(bound_host, bound_port)

    async def start_private(self, socket_path: Path) -> None:
        """Listens on a Unix socket instead. Raises OSError."""
        self._server = await asyncio.start_unix_server(self._connected, socket_path, limit=MAX_HEADER_BYTES)

    async def stop(self) -> None:
        """Stops listening; answers under way are finished."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                status, content_type, body, with_body = await self._answer(reader)
                writer.write(
                    f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {content_type}\r\n"
                    f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode("ascii")
                )
                if with_body:
                    writer.write(body)
                await writer.drain()
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader) -> tuple[HTTPStatus, str, bytes, bool]:
        """Status, content type, body, and whether the body is wanted."""
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            method, target, _ = head.partition("\r\n")[0].split(" ")
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError):
            return HTTPStatus.BAD_REQUEST, PLAIN, b"not an HTTP request that this server takes\n", True
        if method not in ("GET", "HEAD"):
            return HTTPStatus.METHOD_NOT_ALLOWED, PLAIN, b"GET and HEAD only\n", True
        path, _, query = target.partition("?")
        return *await self._page(path, head, verbose="verbose" in query.split("&")), method == "GET"

    async def _page(self, path: str, head: str, *, verbose: bool) -> tuple[HTTPStatus, str, bytes]:
        match path:
            case "/metrics":
                return await self._render(head)
            case "/livez":
                return _verdict(await self._alive(), verbose=verbose)
            case "/readyz" | "/healthz":
                return _verdict(await self._ready(), verbose=verbose)
            case _:
                return HTTPStatus.NOT_FOUND, PLAIN, b"here are /metrics, /livez, /readyz and /healthz\n"

    async def _render(self, head: str) -> tuple[HTTPStatus, str, bytes]:
        fields = (line.partition(":") for line in head.split("\r\n")[1:])
        accept = ",".join(value.strip() for name, _, value in fields if name.lower() == "accept")
        try:
            body, content_type = await self._metrics(accept)
        except Exception:
            logger.exception("the metrics could not be read")
            return HTTPStatus.INTERNAL_SERVER_ERROR, PLAIN, b"the metrics could not be read; see the log\n"
        return HTTPStatus.OK, content_type, body


def _verdict(checks: Checks, *, verbose: bool) -> tuple[HTTPStatus, str, bytes]:
    """Whether all is well, and what is not; `verbose`: check by check, as Kubernetes' own endpoints do."""
    troubles = [trouble for trouble in checks.values() if trouble]
    lines = ["; ".join(troubles) or "ok"]
    if verbose:
        marks = (f"[-]{name} failed: {trouble}" if trouble else f"[+]{name} ok" for name, trouble in checks.items())
        lines = [*marks, "not ok" if troubles else "ok"]
    status = HTTPStatus.SERVICE_UNAVAILABLE if troubles else HTTPStatus.OK
    return status, PLAIN, "".join(f"{line}\n" for line in lines).encode()
