"""One of the processes, as their parent sees it."""

import asyncio
import contextlib
import sys
from http import HTTPStatus

from equipoise_server.part import Part
from equipoise_server.settings import Settings

POLL_S = 0.02
MODULE = "equipoise_server.processes"


class Child:
    """A process that can be started again and again; it ends when the parent does.

    Args:
        part: which process it is.
        settings: of the whole server.
    """

    def __init__(self, part: Part, settings: Settings) -> None:
        self._part = part
        self._order = part.order(part.settings(settings))
        self._process: asyncio.subprocess.Process | None = None
        self.serves = False
        """Whether it answers calls."""

    @property
    def number(self) -> int:
        """Its number."""
        return self._part.number

    @property
    def pid(self) -> int:
        """Of the process that was started last."""
        return self._process.pid if self._process else 0

    async def start(self) -> None:
        """Starts it, and returns at once."""
        for path in (self._part.socket, self._part.ready_file):
            path.unlink(missing_ok=True)
        # A session of its own: Ctrl-C is for the parent, which tells it.
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", MODULE, stdin=asyncio.subprocess.PIPE, start_new_session=True
        )
        self._say(self._order)

    def meet_others(self) -> None:
        """Tells it that all processes serve."""
        self._say(b"\n")

    async def served(self) -> None:
        """Returns once it answers calls."""
        while not self.serves:
            await asyncio.sleep(POLL_S)
            self.serves = self._part.ready_file.exists()

    async def wait(self) -> int:
        """Waits until it has ended; its exit status, negative for a signal."""
        assert self._process is not None, "it was started"
        status = await self._process.wait()
        self.serves = False
        return status

    def send_signal(self, number: int) -> None:
        """Sends a signal, if it runs."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def ask(self, path: str, *, timeout_s: float) -> tuple[bool, bytes]:
        """Whether a page of its side door is well (status 200), and the page.

        Raises:
            FileNotFoundError, ConnectionRefusedError: it has not begun, or has ended.
            TimeoutError, OSError: it does not answer.
        """
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_unix_connection(self._part.socket)
            try:
                writer.write(f"GET {path} HTTP/1.1\r\n\r\n".encode("ascii"))
                head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            finally:
                writer.close()
        return head.split(b" ")[1:2] == [str(HTTPStatus.OK.value).encode()], body

    def _say(self, line: bytes) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(ConnectionError):  # it has ended, which `wait` tells
            self._process.stdin.write(line)
