"""DeepMind Reverb beside ours: an interpreter that has dm-reverb runs its server and its client."""

import asyncio
import json
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from equipoise_server.bench.caller import Sent
from equipoise_server.bench.load import Case

PEER = Path(__file__).with_name("reverb_peer.py")
MAX_ITEMS = 200_000
"""In its table, of which it fills some ten thousand a second: its time per item does not depend on their number."""
THREADS = 8
"""That call for a trainer that pipelines: its client waits for each answer."""
ANSWER_LIMIT_BYTES = 64 << 20


class NoReverbError(Exception):
    """An interpreter has no Reverb that works; the message says why."""


@dataclass(frozen=True, slots=True)
class ReverbServer:
    """One that serves.

    Attributes:
        python: interpreter.
        port: on this machine.
        pid: process id.
    """

    python: str
    port: int
    pid: int


@asynccontextmanager
async def reverb_server(python: str, *, items: int) -> AsyncIterator[ReverbServer]:
    """A server with a table of so many items, at most MAX_ITEMS; it ends with this process.

    Raises NoReverbError.
    """
    try:
        process = await _start(python, "serve", str(min(items, MAX_ITEMS)))
    except OSError as error:
        raise NoReverbError(f"{python}: {error.strerror}") from None
    try:
        port = await _line(process)
        yield ReverbServer(python, int(port), process.pid)
    finally:
        await _end(process)


class ReverbClients:
    """Clients of all trainers of a case, in one process of the other interpreter. A `Caller`."""

    def __init__(self, process: Process) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @classmethod
    async def open(cls, stack: AsyncExitStack, case: Case, server: ReverbServer) -> "ReverbClients":
        """Clients of a server. Raises NoReverbError."""
        threads = THREADS if case.pipelined else 1
        given = (str(server.port), str(case.rows), str(case.trainers), str(threads))
        process = await _start(server.python, "send", *given)
        stack.push_async_callback(_end, process)
        await _line(process)
        return cls(process)

    async def send(self, seconds: float) -> list[Sent]:
        """See `Caller`."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n".encode())
        taken: list[list[float]] = json.loads(await _line(self._process))
        return [(len(each), each) for each in taken]


async def _start(python: str, *arguments: str) -> Process:
    # Isolated: this folder, which has a `reverb` of its own, is not on its path, nor are packages of ours.
    return await asyncio.create_subprocess_exec(
        python, "-I", str(PEER), *arguments, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, limit=ANSWER_LIMIT_BYTES
    )


async def _line(process: Process) -> bytes:
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        raise NoReverbError(f"its process ended with {await process.wait()}: has the interpreter dm-reverb?")
    return line


async def _end(process: Process) -> None:
    if process.returncode is None:
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(10):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
