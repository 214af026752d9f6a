"""A real server process for tests: `serve()`. Needs the extras `[server]` and `[embedded]`."""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import TypeAlias

from equipoise.errors import UnavailableError

__all__ = ["ServerProcess", "serve"]

Setting: TypeAlias = str | int | float | Path
"""Value of a server's setting."""

FREE_PORT = "127.0.0.1:0"
START_SECONDS = 60.0
"""Longest start: most of it is loading torch on a busy machine."""
STOP_SECONDS = 30.0
_POLL_SECONDS = 0.02
_LOG_TAIL = 2000


class ServerProcess:
    """A server with a port and a data directory of its own, which a test can kill, pause and start again.

    It ends when the process that started it ends, however that happens. Processes forked from that one keep it alive.

    Attributes:
        address: `host:port` of the gRPC service. It stays the same after a restart.
        metrics_address: `host:port` of `/metrics` and `/healthz`.
        data_dir: folder of the server's own Redis.
    """

    def __init__(self, directory: Path, settings: dict[str, Setting]) -> None:
        self.data_dir = directory / "data"
        self.data_dir.mkdir(exist_ok=True)
        self.address = str(settings.pop("listen", FREE_PORT))
        self.metrics_address = str(settings.pop("metrics_listen", FREE_PORT))
        self._settings = settings
        self._log = directory / "server.log"
        self._ready = directory / "ready.json"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        assert self._process is not None, "the server does not run"
        return self._process.pid

    @property
    def log(self) -> str:
        """Everything the server has written, over all its starts."""
        return self._log.read_text(errors="replace")

    def start(self) -> None:
        """Starts the server, and returns once it serves.

        Raises:
            UnavailableError: it ended, or was not ready within a minute. The message holds the end of its log.
        """
        self._ready.unlink(missing_ok=True)
        with self._log.open("ab") as log:
            # Nothing is written to the pipe: that it is open tells the server that this process lives. A Ctrl-C is for
            # this process, which then stops the server: two signals would end it at once, with its files left.
            self._process = subprocess.Popen(
                self._command(), stdin=subprocess.PIPE, stdout=log, stderr=log, process_group=0
            )
        end = monotonic() + START_SECONDS
        while not self._ready.exists():
            if self._process.poll() is not None:
                raise UnavailableError(f"the server ended with {self.kill()}:\n{self.log[-_LOG_TAIL:]}")
            if monotonic() > end:
                self.kill()
                raise UnavailableError(f"not ready after {START_SECONDS} s:\n{self.log[-_LOG_TAIL:]}")
            sleep(_POLL_SECONDS)
        ready = json.loads(self._ready.read_text())
        self.address = ready["address"]
        self.metrics_address = ready.get("metrics_address") or ""

    def kill(self) -> int:
        """Ends the server at once (SIGKILL) and returns its exit status. What it had not written is lost."""
        return self._end(signal.SIGKILL)

    def stop(self) -> int:
        """Ends the server in order (SIGTERM) and returns its exit status."""
        return self._end(signal.SIGTERM)

    def pause(self) -> None:
        """Freezes the server (SIGSTOP). Its connections stay open and silent."""
        assert self._process is not None, "the server does not run"
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Lets a paused server go on."""
        assert self._process is not None, "the server does not run"
        self._process.send_signal(signal.SIGCONT)

    def restart(self) -> None:
        """Starts the server again, with the same port and data directory. Kills it first if it runs."""
        self.kill()
        self.start()

    def _end(self, signum: signal.Signals) -> int:
        if self._process is None:
            return 0
        process, self._process = self._process, None
        process.send_signal(signum)
        process.send_signal(signal.SIGCONT)  # a paused process takes no SIGTERM
        try:
            return process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()
        finally:
            assert process.stdin is not None, "it was asked for"
            process.stdin.close()

    def _command(self) -> list[str]:
        settings: dict[str, Setting] = {
            "listen": self.address,
            "metrics_listen": self.metrics_address,
            "data_dir": self.data_dir,
            "ready_file": self._ready,
            **self._settings,
        }
        flags = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        return [sys.executable, "-m", "equipoise.bound", "serve", *flags]


@contextmanager
def serve(**settings: Setting) -> Iterator[ServerProcess]:
    """Runs a real server on a free port, and removes its data directory at the end.

    Example:
        >>> with serve(log_timeout_s=0.1) as server, PolicyClient(server.address, policy="t", num_examples=4) as client:
        ...     client.step([0, 1], contributions=[1.0, -1.0])
        ...     server.kill()
        ...     server.restart()

    Args:
        **settings: settings of the server by name, as `equipoise serve --help` lists them, with underscores.

    Raises:
        UnavailableError: the server does not start. The message holds the end of its log.
    """
    # A short path: the server's Redis listens on a socket in it, whose path is limited to about 100 bytes.
    directory = Path(tempfile.mkdtemp(prefix="equipoise-"))
    server = ServerProcess(directory, dict(settings))
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(directory, ignore_errors=True)
