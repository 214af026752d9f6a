"""A real Redis over a Unix socket, one for the session and emptied for each test."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from redis.asyncio import Redis

from equipoise_server.store import LogEntry, Ownership, Page, PageBatch, RedisStore, StoredPolicy
from equipoise_server.store.redis_binary import find_redis_server


@dataclass
class RedisProcess:
    """A Redis process that tests may pause, kill and configure."""

    socket: Path
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)


@dataclass
class CountingObserver:
    commands: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    _called: asyncio.Event = field(default_factory=asyncio.Event)

    def command(self, name: str, seconds: float) -> None:
        assert seconds >= 0
        self.commands.append(name)
        self._called.set()

    async def until(self, name: str, *, count: int) -> None:
        """Wait until a command has ended so many times."""
        while self.commands.count(name) < count:
            self._called.clear()
            await self._called.wait()

    def error(self, kind: str) -> None:
        self.errors.append(kind)


def wait_until_answering(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None, "redis-server ended"
        assert time.monotonic() < deadline, "redis-server does not answer"
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1)
            probe.connect(str(path))
            probe.sendall(b"PING\r\n")
            if probe.recv(64) == b"+PONG\r\n":
                return
        time.sleep(0.01)


@contextlib.contextmanager
def running_redis(directory: Path, *settings: str, config: Path | None = None) -> Iterator[RedisProcess]:
    """A Redis in a directory whose path is short enough for a socket."""
    path = directory / "redis.sock"
    path.unlink(missing_ok=True)
    defaults = ("--port", "0", "--unixsocket", str(path), "--save", "", "--logfile", "redis.log")
    file = () if config is None else (str(config),)
    process = subprocess.Popen([find_redis_server(), *file, *defaults, *settings], cwd=directory)
    try:
        wait_until_answering(path, process)
        yield RedisProcess(path, process)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def short_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="eqtest-", dir="/tmp") as path:
        yield Path(path)


@pytest.fixture(scope="session")
def shared_redis(short_dir: Path) -> Iterator[RedisProcess]:
    with running_redis(short_dir) as process:
        yield process


@pytest.fixture
async def admin(shared_redis: RedisProcess) -> AsyncIterator[Redis]:
    """A client of the shared Redis, emptied, for what an operator or a fault does."""
    client = Redis.from_url(shared_redis.url, protocol=2)
    await client.flushall()
    yield client
    await client.aclose()


@pytest.fixture
def observer() -> CountingObserver:
    return CountingObserver()


@pytest.fixture
async def store(shared_redis: RedisProcess, admin: Redis, observer: CountingObserver) -> AsyncIterator[RedisStore]:
    found = RedisStore.connect(shared_redis.url, command_timeout_s=5, observer=observer)
    yield found
    await found.close()


def policy(name: str = "lm", *, uid: str = "u1", spec: str = '{"rule": "uniform"}') -> StoredPolicy:
    return StoredPolicy(name=name, uid=uid, create_time=1_700_000_000.125, spec=spec)


def entries(first: int, last: int, *, size: int = 8) -> list[LogEntry]:
    """Entries first..last, each with content of its own."""
    return [
        LogEntry(version=v, fields={"ids": str(v).encode().rjust(size, b"."), "t": b""}) for v in range(first, last + 1)
    ]


async def write_page(store: RedisStore, owner: Ownership, index: int, page: Page) -> None:
    """A page by itself."""
    await store.write_page(owner, index, page, batch=PageBatch())


async def write_header(store: RedisStore, owner: Ownership, fields: Mapping[str, bytes]) -> None:
    """A header by itself."""
    await store.write_header(owner, fields, version=0, batch=PageBatch())


async def logged(store: RedisStore, name: str = "lm", *, after: int = 0) -> list[LogEntry]:
    return [entry async for entry in store.read_log(name, after=after)]


async def eventually(condition: Callable[[], Awaitable[bool]], *, timeout_s: float = 60) -> None:
    """Wait for something that announces itself to nobody."""
    async with asyncio.timeout(timeout_s):
        while not await condition():
            await asyncio.sleep(0.01)


def is_running(pid: int) -> bool:
    """Whether a process lives; one that ended and was not collected yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
