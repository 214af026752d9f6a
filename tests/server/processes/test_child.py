"""What the parent learns of a process at its side door, and what it makes of one that says nothing."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from equipoise_server.processes import child as module
from equipoise_server.processes.child import HUNG_ANSWERS, SILENT, STARTING, Child
from equipoise_server.settings import Settings
from tests.server.test_part import part

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nok\n"
NOT_READY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 5\r\nConnection: close\r\n\r\nwhy?\n"


@pytest.fixture
def child(tmp_path: Path) -> Child:
    return Child(part(directory=str(tmp_path)), Settings(processes=3))


@asynccontextmanager
async def saying(child: Child, words: bytes | None) -> AsyncIterator[None]:
    """A process in its place that answers so, whatever it is asked; None: it takes connections, and that is all."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if words is None:
            await reader.read()
        else:
            writer.write(words)
        writer.close()

    server = await asyncio.start_unix_server(answer, child.socket)
    try:
        yield
    finally:
        server.close()
        child.socket.unlink(missing_ok=True)  # from Python 3.13 on, its server has removed it


@asynccontextmanager
async def watching(child: Child, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[int]]:
    """Yields the signals that it is sent."""
    sent: list[int] = []
    monkeypatch.setattr(child, "send_signal", sent.append)
    monkeypatch.setattr(module, "CHECK_S", 0.0)
    task = asyncio.create_task(child.watch())
    try:
        yield sent
    finally:
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0)


def counted(ask: Callable[[str], Awaitable[tuple[bool, bytes]]]) -> tuple[list[str], Callable[[str], object]]:
    asked: list[str] = []

    async def asking(path: str) -> tuple[bool, bytes]:
        try:
            return await ask(path)
        finally:
            asked.append(path)

    return asked, asking


async def test_what_it_lacks_is_known_at_any_time(child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    assert child.lacks == STARTING
    async with watching(child, monkeypatch) as sent:
        async with saying(child, NOT_READY):
            await until(lambda: child.lacks == "why?")
        await until(lambda: child.lacks == STARTING)
        async with saying(child, OK):
            await until(lambda: child.lacks == "")
        assert sent == []


async def test_one_that_served_and_says_nothing_for_long_is_killed_once(
    child: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ANSWER_S", 0.001)
    asked, asking = counted(child.ask)
    monkeypatch.setattr(child, "ask", asking)
    child.serves = True
    async with saying(child, None), watching(child, monkeypatch) as sent:
        await until(lambda: child.lacks == SILENT)
        await until(lambda: sent)
        assert len(asked) == HUNG_ANSWERS
        await until(lambda: len(asked) > 3 * HUNG_ANSWERS)
        assert sent == [signal.SIGKILL]


async def test_one_that_has_not_served_yet_may_take_its_time(child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be looking for its device, or waits for a Redis."""
    monkeypatch.setattr(module, "ANSWER_S", 0.001)
    asked, asking = counted(child.ask)
    monkeypatch.setattr(child, "ask", asking)
    async with saying(child, None), watching(child, monkeypatch) as sent:
        await until(lambda: len(asked) > 2 * HUNG_ANSWERS)
        assert (child.lacks, sent) == (SILENT, [])


@pytest.mark.parametrize("words", [b"", OK[:30], OK[:-1]])
async def test_what_ends_early_is_no_answer(child: Child, words: bytes) -> None:
    """Of a process that is killed while it tells: half of its counters must not be taken for all."""
    async with saying(child, words):
        with pytest.raises(ConnectionError, match="ends early"):
            await child.ask("/metrics")
    async with saying(child, OK):
        assert await child.ask("/metrics") == (True, b"ok\n")


def test_the_parent_does_without_torch() -> None:
    """A third of a gigabyte, and seconds until it listens."""
    code = "import sys; import equipoise_server.processes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
