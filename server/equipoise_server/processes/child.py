"""One of the processes, as their parent sees it."""

import asyncio
import contextlib
import signal
import sys
from http import HTTPStatus
from pathlib import Path

import structlog

from equipoise_server.part import Part
from equipoise_server.settings import Settings

log = structlog.get_logger("equipoise.processes")

POLL_S = 0.02
CHECK_S = 1.0
"""How often it is asked whether it is well."""
ANSWER_S = 3.0
"""How long it may take to answer; what asks the parent waits somewhat longer."""
HUNG_ANSWERS = 8
"""Answers that a process that served owes in a row when it is killed: half a minute of silence."""
STARTING = "it is starting"
SILENT = "it does not answer"
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
        """Whether it has come to answer calls."""
        self.lacks = STARTING
        """Why it is not ready, as far as is known; empty: it is."""

    @property
    def number(self) -> int:
        """Its number."""
        return self._part.number

    @property
    def socket(self) -> Path:
        """Unix socket of its side door."""
        return self._part.socket

    @property
    def pid(self) -> int:
        """Of the process that was started last."""
        return self._process.pid if self._process else 0

    async def start(self) -> None:
        """Starts it, and returns at once. Raises OSError."""
        self.lacks = STARTING
        for path in (self.socket, self._part.ready_file):
            path.unlink(missing_ok=True)
        # A session of its own: Ctrl-C is for the parent, which tells it.
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", MODULE),  # -P: no modules from the folder where it happens to be started
            stdin=asyncio.subprocess.PIPE,
            start_new_session=True,
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

    async def watch(self) -> None:
        """Keeps `lacks` true until cancelled, and kills the process when it says nothing for long.

        One that hangs would go on to be given its part of the connections, and nobody else can take it from the port.
        """
        owed = 0
        while True:
            try:
                well, page = await self.ask("/readyz")
                self.lacks, owed = "" if well else page.decode().strip(), 0
            except TimeoutError:
                self.lacks, owed = SILENT, owed + 1
            except (FileNotFoundError, ConnectionError):
                self.lacks = STARTING
            except OSError as error:  # that may be our trouble instead of its own
                self.lacks = f"it cannot be asked: {error.strerror}"
            if self.serves and owed == HUNG_ANSWERS:
                log.error("a process does not answer and is killed", process=self.number, pid=self.pid)
                self.send_signal(signal.SIGKILL)
            await asyncio.sleep(CHECK_S)

    async def wait(self) -> int:
        """Waits until it has ended; its exit status, negative for a signal."""
        assert self._process is not None, "it was started"
        status = await self._process.wait()
        self.serves, self.lacks = False, STARTING
        return status

    def send_signal(self, number: int) -> None:
        """Sends a signal, if it runs."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def ask(self, path: str) -> tuple[bool, bytes]:
        """Whether a page of its side door is well (status 200), and the page.

        Raises:
            FileNotFoundError, ConnectionError: it has not begun, or has ended.
            TimeoutError: it does not answer.
            OSError: it cannot be asked.
        """
        async with asyncio.timeout(ANSWER_S):
            reader, writer = await asyncio.open_unix_connection(self.socket)
            try:
                writer.write(f"GET {path} HTTP/1.1\r\n\r\n".encode("ascii"))
                head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            finally:
                writer.close()
        if f"Content-Length: {len(body)}\r\n".encode() not in head:
            raise ConnectionResetError(f"{path} ends early")
        return head.split(b" ")[1:2] == [str(HTTPStatus.OK.value).encode()], body

    def _say(self, line: bytes) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(ConnectionError):  # it has ended, which `wait` tells
            self._process.stdin.write(line)
