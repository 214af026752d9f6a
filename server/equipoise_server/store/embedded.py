"""A Redis of the server's own, for those who have none."""

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias

import structlog

from equipoise_server.store import parent_bound
from equipoise_server.store.data_directory import DataDirectory
from equipoise_server.store.errors import StoreError
from equipoise_server.store.file_sync import FileSync
from equipoise_server.store.redis_binary import find_redis_server

log = structlog.get_logger("equipoise.redis")

Fsync: TypeAlias = Literal["everysec", "always"]
"""When Redis's file is forced to disk; `always` is what survives the loss of power."""

LOG_FILE = "redis.log"

_SOCKET = "redis.sock"
_LOADING_SOCKET = "loading.sock"
"""Where Redis listens until its file has been found whole: nobody else looks there."""
_SOCKET_DIR_PREFIX = "equipoise-"
_LONGEST_SOCKET_PATH = 100  # bytes; systems allow 104 to 108
_POLL_S = 0.01
_RESTART_PAUSE_S = (0.1, 5.0)  # after the first failure, and at most


class EmbeddedRedisFailed(StoreError):  # noqa: N818 - as the rest of the tree
    """The embedded Redis did not start."""


class EmbeddedRedis:
    """Starts, watches and stops a Redis process that keeps its data in one directory.

    It listens on a Unix socket that only this user can open, and on no network. Every write is in its append-only file
    before it is answered, however slow the disk is, so that what was answered survives the death of its process; it
    dies with the server (see `parent_bound`), and the next start loads its file. Start it from the main thread.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        fsync: Fsync = "everysec",
        on_sync_change: Callable[[OSError | None], None] = lambda error: None,
        lock_timeout_s: float = 10.0,
        start_timeout_s: float = 300.0,
    ) -> None:
        """Prepare; nothing happens before `start`.

        Args:
            data_dir: created if missing.
            fsync: when writes reach the disk.
            on_sync_change: told when the disk refuses to be synced, and None once it does not any more; any thread.
            lock_timeout_s: seconds to wait for the last user of the directory to end.
            start_timeout_s: seconds that loading the file may take.
        """
        self._directory = DataDirectory(data_dir.resolve())
        self._fsync = fsync
        self._sync = FileSync(self._directory.path, on_change=on_sync_change)
        self._lock_timeout_s = lock_timeout_s
        self._start_timeout_s = start_timeout_s
        self._process: asyncio.subprocess.Process | None = None
        self._socket_dir: Path | None = None
        self._stopping = False
        self._changing = asyncio.Lock()

    @property
    def url(self) -> str:
        """Where the store connects to; the same after a restart."""
        return f"unix://{self.socket}"

    @property
    def socket(self) -> Path:
        """The Unix socket."""
        if self._socket_dir is None:
            raise RuntimeError("the embedded Redis has not been started")
        return self._socket_dir / _SOCKET

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int | None:
        """Of the last process started."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Lock the directory, start Redis and return when it has loaded its file and answers.

        Raises:
            DataDirectoryInUse: another server, or its Redis, uses the directory.
            RedisBinaryMissing: no `redis-server` on this machine.
            EmbeddedRedisFailed: it ended, or loaded for too long; the message holds the end of its log.
        """
        await self._directory.lock(timeout_s=self._lock_timeout_s)
        try:
            _remove_socket_dir(self._directory.holder().get("socket_dir"))
            self._stopping = False
            self._socket_dir = _new_socket_dir()
            async with self._changing:
                await self._launch()
            if self._fsync == "everysec":
                self._sync.start()
        except BaseException:
            await self.stop()
            raise

    async def stop(self, *, timeout_s: float = 10.0) -> None:
        """Ask Redis to write out its file and end; kill it after `timeout_s` seconds. Can be called again."""
        self._stopping = True
        async with self._changing:
            if self._process is not None:
                await _end(self._process, timeout_s=timeout_s)
            await asyncio.to_thread(self._sync.stop)
            if self._socket_dir is not None:
                _remove_socket_dir(str(self._socket_dir))
            self._directory.release()

    async def wait(self) -> int:
        """Wait until the process ends; its exit status (negative: the signal that killed it)."""
        if self._process is None:
            raise RuntimeError("the embedded Redis has not been started")
        return await self._process.wait()

    async def restart(self) -> None:
        """Start Redis again, on the same directory and socket; first ends the process if it still runs.

        Raises:
            EmbeddedRedisFailed: as for `start`.
        """
        async with self._changing:
            if self._process is not None:
                await _end(self._process, timeout_s=self._lock_timeout_s)
            await self._launch()

    async def supervise(self, *, on_exit: Callable[[int], None] | None = None) -> None:
        """Restart Redis whenever it ends, with growing pauses where that fails, until `stop`; run it as a task.

        Args:
            on_exit: told the exit status each time.
        """
        shortest, longest = _RESTART_PAUSE_S
        pause = shortest
        while True:
            status = await self.wait()
            if self._stopping:
                return
            if on_exit is not None:
                on_exit(status)
            try:
                await self.restart()
                pause = shortest
            except StoreError:
                await asyncio.sleep(pause)
                pause = min(2 * pause, longest)

    async def _launch(self) -> None:
        """Starts Redis on a file that needs no cut.

        Killed in the middle of a write, Redis leaves a command that it cuts off at its next start. When that command
        was part of a transaction, the beginning of the transaction stays: Redis does not apply it, writes behind it,
        and applies it at a later start in place of what was acknowledged since. Redis takes it away, too, when it
        starts once more before it has written anything.
        """
        while True:
            before = self._file_bytes()
            await self._run()
            lost = before - self._file_bytes()
            if lost <= 0:
                break
            log.warning("redis was killed in the middle of a write: what was half written is cut off", bytes=lost)
            assert self._process is not None
            await _end(self._process, timeout_s=self._lock_timeout_s)
        self._loading_socket.replace(self.socket)

    def _file_bytes(self) -> int:
        """Bytes of the append-only file, which is several since Redis 7."""
        files = (path for pattern in ("*.aof", "appendonlydir/*") for path in self._directory.path.glob(pattern))
        return sum(path.stat().st_size for path in files)

    @property
    def _loading_socket(self) -> Path:
        return self.socket.with_name(_LOADING_SOCKET)

    async def _run(self) -> None:
        if self._stopping:
            raise EmbeddedRedisFailed("the embedded Redis is being stopped")
        binary = find_redis_server()
        for socket in (self.socket, self._loading_socket):
            socket.unlink(missing_ok=True)
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", parent_bound.__file__, str(os.getpid()), str(binary)),
            *self._settings(),
            cwd=self._directory.path,
            pass_fds=(self._directory.fd,),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            # Interrupting the server from a terminal must not end Redis before the server is done with it.
            start_new_session=True,
            umask=0o077,  # the directory may have been there before, open to others
        )
        self._directory.sign(server_pid=os.getpid(), redis_pid=self._process.pid, socket_dir=str(self._socket_dir))
        await self._loaded()

    def _settings(self) -> list[str]:
        # The directory is the process's working directory.
        settings = {
            "port": "0",
            "unixsocket": str(self._loading_socket),
            "unixsocketperm": "700",
            "daemonize": "no",
            "save": "",
            "appendonly": "yes",
            # Not `everysec`, with which Redis answers before it writes while the disk is slow: see `FileSync`.
            "appendfsync": "always" if self._fsync == "always" else "no",
            "maxmemory-policy": "noeviction",
            "logfile": LOG_FILE,
            "loglevel": "warning",
        }
        return [part for name, value in settings.items() for part in (f"--{name}", value)]

    async def _loaded(self) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        while not await _answers(self._loading_socket):
            if self._stopping or not self.alive:
                raise EmbeddedRedisFailed(f"Redis ended while starting in {self._directory.path}: {self._last_words()}")
            if time.monotonic() >= deadline:
                raise EmbeddedRedisFailed(
                    f"Redis has not loaded {self._directory.path} in {self._start_timeout_s:g} s: {self._last_words()}"
                )
            await asyncio.sleep(_POLL_S)

    def _last_words(self) -> str:
        try:
            lines = (self._directory.path / LOG_FILE).read_text(errors="replace").splitlines()
        except OSError:
            return "it wrote no log"
        return " | ".join(lines[-3:]) or "its log is empty"


async def _answers(socket: Path) -> bool:
    """Whether a Redis answers PONG there: not LOADING, not silence."""
    try:
        async with asyncio.timeout(1):
            reader, writer = await asyncio.open_unix_connection(str(socket))
            try:
                writer.write(b"PING\r\n")
                return await reader.readline() == b"+PONG\r\n"
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False


async def _end(process: asyncio.subprocess.Process, *, timeout_s: float) -> None:
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        await asyncio.wait_for(process.wait(), timeout_s)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _new_socket_dir() -> Path:
    path = Path(tempfile.mkdtemp(prefix=_SOCKET_DIR_PREFIX))
    if len(os.fsencode(path / _LOADING_SOCKET)) > _LONGEST_SOCKET_PATH:
        path.rmdir()
        path = Path(tempfile.mkdtemp(prefix=_SOCKET_DIR_PREFIX, dir="/tmp"))
    return path


def _remove_socket_dir(path: Any) -> None:
    """Remove a socket's directory, our own or one that a killed server left, and nothing else."""
    if isinstance(path, str) and Path(path).name.startswith(_SOCKET_DIR_PREFIX):
        for name in (_SOCKET, _LOADING_SOCKET):
            (Path(path) / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            Path(path).rmdir()
