"""Servers in a hundredth of a second: a process that has loaded everything a server needs, and forks.

    python -m tests.e2e.faults.zygote

It reads orders from its standard input, one JSON array a line, and answers each with a line: `["start", arguments, log,
environment]` with the pid of a new server, `["wait", pid]` with the exit status of one that has ended. It dies with its
parent. A forked server is a process like any other: it begins where `equipoise serve` does, with nothing but modules
loaded.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from equipoise.errors import UnavailableError
from tests.e2e.faults import stacks
from tests.ports import free_port

START_SECONDS = 300.0
"""Until a server serves; one with several processes loads everything anew in each."""
STACKS_SECONDS = 3.0
END_SECONDS = 60.0
"""Of the process that forks, on a busy machine."""
STOP_SECONDS = 90.0
"""More than a server gives itself: its grace, what is left to write, and the end of its Redis."""
PR_SET_PDEATHSIG = 1


class Zygote:
    """The process, seen from its parent."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[3],
            text=True,
        )
        self._asking = threading.Lock()
        assert self._ask() == "ready"

    def start(self, arguments: Sequence[str], *, log: Path) -> int:
        """Forks a server; its pid."""
        return int(self._ask("start", list(arguments), str(log), dict(os.environ)))

    def wait(self, pid: int) -> int:
        """Waits until a server has ended; its exit status, negative for a signal."""
        return int(self._ask("wait", pid))

    def close(self) -> None:
        """Ends the process; its servers must have ended before."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(END_SECONDS)
        self._process.stdout.close()

    def _ask(self, *order: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._asking:
            if order:
                self._process.stdin.write(json.dumps(order) + "\n")
                self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())


class ForkedServer:
    """One server that can be killed, paused and started again, always on the same port.

    Attributes:
        address: `host:port` of the gRPC service.
        metrics_address: `host:port` of `/metrics`.
        data_dir: folder of a Redis of its own.
        starts: seconds that each start took until the server served.
    """

    def __init__(self, zygote: Zygote, directory: Path, **settings: str | float | Path) -> None:
        directory.mkdir(exist_ok=True)
        self.address = str(settings.pop("listen", f"127.0.0.1:{free_port()}"))
        self.metrics_address = str(settings.pop("metrics_listen", f"127.0.0.1:{free_port()}"))
        self.pid = 0
        self.starts: list[float] = []
        self._zygote = zygote
        self._settings = {"data_dir": directory / "data", **settings}
        self.data_dir = Path(str(self._settings["data_dir"]))
        self._log = directory / "server.log"
        self._ready = directory / "ready.json"

    @property
    def log(self) -> str:
        """What the server has written so far, over all its starts."""
        return self._log.read_text(errors="replace")

    def start(self) -> None:
        """Starts the server and returns once it serves."""
        started = monotonic()
        self.launch()
        while not self._ready.exists():
            assert monotonic() < started + START_SECONDS, f"not ready in {START_SECONDS} s:\n{self.log[-3000:]}"
            if (Path("/proc") / str(self.pid) / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
                status, self.pid = self._zygote.wait(self.pid), 0
                raise UnavailableError(f"the server ended with {status}:\n{self.log[-3000:]}")
            sleep(0.002)
        ready = json.loads(self._ready.read_text())
        self.address, self.metrics_address = ready["address"], ready["metrics_address"]
        self.starts.append(monotonic() - started)

    def launch(self) -> None:
        """Starts the server and does not wait for it."""
        assert not self.pid, "the server runs"
        self._ready.unlink(missing_ok=True)
        settings = {
            "listen": self.address,
            "metrics_listen": self.metrics_address,
            "ready_file": self._ready,
            **self._settings,
        }
        flags = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        self.pid = self._zygote.start(flags, log=self._log)

    def kill(self) -> None:
        """Ends the server at once (SIGKILL)."""
        self._end(signal.SIGKILL)

    def kill_both(self) -> None:
        """Ends the server and the Redis of its own at once (SIGKILL)."""
        lock = self.data_dir / "equipoise.lock"
        os.kill(self.pid, signal.SIGSTOP)  # it would take the end of its Redis as a request to stop in order
        os.kill(int(json.loads(lock.read_text())["redis_pid"]), signal.SIGKILL)
        self.kill()

    def stop(self) -> int:
        """Ends the server in order (SIGTERM); its exit status."""
        return self._end(signal.SIGTERM)

    def restart(self) -> None:
        """Starts the server again. Kills it first if it runs."""
        self.kill()
        self.start()

    def terminate(self) -> None:
        """Asks the server to end (SIGTERM) and does not wait; `join` does."""
        os.kill(self.pid, signal.SIGTERM)

    def join(self) -> int:
        """Waits until the server has ended by itself; its exit status."""
        pid, self.pid = self.pid, 0
        return self._zygote.wait(pid)

    def pause(self) -> None:
        """Stops the server from running (SIGSTOP): its connections stay open and silent."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Lets a paused server run again."""
        os.kill(self.pid, signal.SIGCONT)

    def stacks(self) -> str:
        """Where the server's threads and tasks are now; it writes them to its log, too."""
        if not self.pid:
            return "the server does not run"
        before = len(self.log)
        for number in (signal.SIGUSR2, signal.SIGUSR1):
            os.kill(self.pid, number)
        end = monotonic() + STACKS_SECONDS
        while stacks.END not in (told := self.log[before:]) and monotonic() < end:
            sleep(0.02)
        return told if stacks.END in told else f"{told}\nits event loop does not turn"

    def _end(self, number: signal.Signals) -> int:
        if not self.pid:
            return 0
        pid, self.pid = self.pid, 0
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            os.kill(pid, signal.SIGCONT)
        return self._zygote.wait(pid)


def main() -> None:
    """Loads a server's modules, then obeys."""
    for module in ("equipoise_server.app", "equipoise_server.commands.serve"):
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a server collects before it serves: not among all that was loaded, of which it would copy each page
    answer("ready")
    for order in orders():
        match order:
            case ["start", arguments, log, environment]:
                pid = os.fork()
                if not pid:
                    become_server(arguments, log, environment)
                answer(pid)
            case ["wait", pid]:
                answer(wait(pid))
    os._exit(0)  # the rest would be unloading modules


def orders() -> Iterator[Any]:
    # Unbuffered: a forked child must not hold half of the next line.
    with os.fdopen(0, "rb", buffering=0) as lines:
        while line := lines.readline():
            yield json.loads(line)


def answer(value: Any) -> None:
    os.write(1, json.dumps(value).encode() + b"\n")


def wait(pid: int) -> int:
    end = monotonic() + STOP_SECONDS
    while monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def become_server(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    from equipoise_server.commands import serve

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for fd in (1, 2):
        os.dup2(out, fd)
    os.environ.clear()
    os.environ.update(environment)
    stacks.tell_on_signals()
    status = 1
    try:
        status = serve.main(arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
