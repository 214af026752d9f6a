"""A Redis of the server's own, for those who have none."""

import asyncio
import contextlib
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias

import structlog

from equipoise_server.store import parent_bound
from equipoise_server.store.append_only import AppendOnlyFiles, steps_in, told_steps
from equipoise_server.store.data_directory import DataDirectory
from equipoise_server.store.errors import StoreError
from equipoise_server.store.file_sync import FileSync, forget_mark, missing_bytes
from equipoise_server.store.redis_binary import find_redis_server
from equipoise_server.store.usage import Usage

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
_OF_A_FILE = re.compile(r"append.?only|AOF|RDB", re.IGNORECASE)
_ADVICE = re.compile(r"(:| \.|\.)? *(You can: 1\)|make a backup of your AOF).*", re.IGNORECASE)
"""What Redis advises about its file: tools that need not be there, and that know nothing of policies."""


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
        self._files = AppendOnlyFiles(self._directory.path)
        self._fsync = fsync
        self._sync = FileSync(self._directory.path, on_change=on_sync_change)
        self._lock_timeout_s = lock_timeout_s
        self._start_timeout_s = start_timeout_s
        self._process: asyncio.subprocess.Process | None = None
        self._socket_dir: Path | None = None
        self._stopping = False
        self._exits = 0
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

    @property
    def exits(self) -> int:
        """How often it has ended by itself."""
        return self._exits

    async def usage(self) -> Usage:
        """What it takes now. Raises OSError."""
        return await asyncio.to_thread(Usage.of, self._directory.path, self.pid if self.alive else None)

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
            self._tell_missing()
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
            self._exits += 1
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
        before, tail, cut = self._files.size, await asyncio.to_thread(self._files.tail), 0
        try:
            while True:
                await self._run()
                size = self._files.size
                if size >= before - cut:
                    break
                cut = before - size
                assert self._process is not None
                await _end(self._process, timeout_s=self._lock_timeout_s)
        finally:
            if cut:
                self._tell_cut(tail[-cut:], cut)
                forget_mark(self._directory.path)
        self._loading_socket.replace(self.socket)

    def _tell_missing(self) -> None:
        """A file that has lost its end between two commands looks whole to Redis."""
        if missing := missing_bytes(self._directory.path):
            log.warning(
                "the file of redis is shorter than what had reached the disk: steps that were acknowledged as durable"
                " are lost unless their trainers still have them",
                directory=str(self._directory.path),
                bytes=missing,
            )
            forget_mark(self._directory.path)

    def _tell_cut(self, content: bytes, size: int) -> None:
        """What Redis could not load is gone: what was half written, and where a disk has lost the end, more."""
        log.warning(
            "redis has cut off the end of its file, which was not whole: steps that were in it are lost unless their"
            " trainers send them again",
            directory=str(self._directory.path),
            bytes=size,
            steps=told_steps(steps_in(content)) or "cannot be read",
        )

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
                raise EmbeddedRedisFailed(self._why_not_started())
            if time.monotonic() >= deadline:
                raise EmbeddedRedisFailed(
                    f"Redis has not loaded {self._directory.path} in {self._start_timeout_s:g} s: {self._last_words()}"
                )
            await asyncio.sleep(_POLL_S)

    def _why_not_started(self) -> str:
        path, words = self._directory.path, self._last_words()
        hint = f"; `equipoise repair {path}` shows what can be saved" if _OF_A_FILE.search(words) else ""
        return f"Redis ended while starting in {path}: {words}{hint}"

    def _last_words(self) -> str:
        try:
            lines = (self._directory.path / LOG_FILE).read_text(errors="replace").splitlines()
        except OSError:
            return "it wrote no log"
        return " | ".join(_ADVICE.sub("", line) for line in lines[-3:]) or "its log is empty"


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
