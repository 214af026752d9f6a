"""Real Redis processes on loopback ports, which tests pause, kill and start again."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis

from equipoise_server.store import parent_bound
from equipoise_server.store.redis_binary import find_redis_server
from tests.e2e.faults.proxy import until

NO_REWRITE = {"auto-aof-rewrite-percentage": "0"}
"""The append-only file keeps every command ever applied: it is the history of the log."""


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as bare:
        bare.bind(("127.0.0.1", 0))
        port: int = bare.getsockname()[1]
        return port


class RedisServer:
    """A Redis that keeps an append-only file in a directory.

    Attributes:
        port: its port; the same after a restart.
    """

    def __init__(self, directory: Path, *arguments: str, **settings: str) -> None:
        directory.mkdir(exist_ok=True, parents=True)
        self.directory = directory
        self.port = free_port()
        self._arguments = arguments
        self._settings = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "save": "",
            "appendonly": "yes",
            "maxmemory-policy": "noeviction",
            "logfile": "redis.log",
            **NO_REWRITE,
            **settings,
        }
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it is reached."""
        return f"redis://127.0.0.1:{self.port}"

    @property
    def append_only_file(self) -> Path:
        """Every command it has applied: one file, since it is never rewritten; in a folder of its own since Redis 7."""
        later = list((self.directory / "appendonlydir").glob("*.incr.aof"))
        return later[0] if later else self.directory / "appendonly.aof"

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Starts it and returns once it answers."""
        self._cut_half_transaction()
        self._run(self._settings)
        until(self._answers, what="redis answers")

    def _cut_half_transaction(self) -> None:
        """Starts Redis where nobody reaches it until its file needs no cut, as `EmbeddedRedis` does."""
        socket = "loading.sock"
        while self.append_only_file.exists():
            before = self.append_only_file.stat().st_size
            self._run({**self._settings, "port": "0", "unixsocket": socket})
            with redis.Redis(unix_socket_path=str(self.directory / socket), socket_timeout=10) as client:
                until(lambda client=client: self._answers(client), what="redis has loaded its file")  # type: ignore[misc]
            self.kill()
            if self.append_only_file.stat().st_size >= before:
                return

    def _run(self, settings: dict[str, str]) -> None:
        # Bound to this process, so that a test that dies leaves nothing behind.
        bound = (sys.executable, "-I", "-S", parent_bound.__file__, str(os.getpid()), str(find_redis_server()))
        flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
        self._process = subprocess.Popen(
            [*bound, *self._arguments, *flags], cwd=self.directory, stdout=subprocess.DEVNULL
        )

    def kill(self) -> None:
        """Ends it at once (SIGKILL)."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """SIGSTOP, and SIGCONT at the end."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def client(self, **options: Any) -> "redis.Redis[bytes]":
        """A connection past every proxy."""
        return redis.Redis(host="127.0.0.1", port=self.port, socket_timeout=10, **options)

    def command(self, *words: str | int) -> Any:
        """Runs one command."""
        with self.client() as client:
            return client.execute_command(*words)

    def _answers(self, client: "redis.Redis[bytes] | None" = None) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.directory / "redis.log").read_text()[-2000:]
        try:
            return (client.ping() if client else self.command("PING")) in (True, b"PONG")
        except redis.RedisError:
            return False
