"""One server with its trainers and its faults, and what is sampled of them."""

import json
import os
import random
import signal
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from time import monotonic, sleep
from typing import TypeAlias

import psutil
import redis

from equipoise.testing import ServerProcess
from tests.e2e.soak.trainers import Trainer
from tests.e2e.soak.verdict import MIB

Sample: TypeAlias = dict[str, float]

VISIT_EVERY_S = 8.0
REDIS_PAUSE_EVERY_S = 30.0
REDIS_PAUSE_S = 1.5
KILL_EVERY_S = 40.0
METRICS = {
    "server MiB": "process_resident_memory_bytes",
    "files": "process_open_fds",
    "tasks": "equipoise_server_event_loop_tasks",
    "policies": "equipoise_server_policies",
    "trainers known": "equipoise_server_clients",
}


class Scene:
    """A server under load and faults.

    Args:
        server: it runs.
        kills: whether it is killed and started again and again; else its Redis is paused now and then.
        chance: decides about everything.
    """

    def __init__(self, server: ServerProcess, *, kills: bool, chance: random.Random) -> None:
        self.name = "killed" if kills else "steady"
        self.complaints: list[str] = []
        self.counts = {"visitors": 0, "visitors killed": 0, "server kills": 0, "redis pauses": 0}
        self._server = server
        self._chance = chance
        self._veterans = [Trainer("steady", server.address, seed=chance.randrange(2**31)) for _ in range(2)]
        self._visitor: Trainer | None = None
        fault, every = (self._kill_server, KILL_EVERY_S) if kills else (self._pause_redis, REDIS_PAUSE_EVERY_S)
        self._due: dict[Callable[[], None], tuple[float, float]] = {}
        for act, period in ((self._change_visitor, VISIT_EVERY_S), (fault, every)):
            self._due[act] = (monotonic() + period * (0.5 + chance.random()), period)

    def act(self) -> None:
        """Does what is due."""
        for act, (at, period) in list(self._due.items()):
            if monotonic() >= at:
                act()
                self._due[act] = (monotonic() + period * (0.5 + self._chance.random()), period)

    def sample(self) -> Sample | None:
        """How things stand; None when the server cannot tell."""
        with suppress(OSError, redis.RedisError, psutil.Error, ValueError, KeyError):
            found = self._metrics()
            found["threads"] = float(psutil.Process(self._server.pid).num_threads())
            found["trainer MiB"] = sum(psutil.Process(one.pid).memory_info().rss for one in self._veterans) / MIB
            with self._redis() as client:
                info = client.info("memory")
                found["redis MiB"] = info["used_memory"] / MIB
                found["redis keys"] = float(client.dbsize())
                found["log entries"] = float(sum(map(client.xlen, client.scan_iter(_type="stream"))))
            return found
        return None

    def stop(self) -> None:
        """Ends the trainers, and notes what they complain about."""
        for trainer in (*self._veterans, *([self._visitor] if self._visitor else [])):
            if complaint := trainer.stop():
                self.complaints.append(f"{self.name}: {complaint}")

    def _metrics(self) -> Sample:
        with urllib.request.urlopen(f"http://{self._server.metrics_address}/metrics", timeout=10) as page:
            lines = (line.rpartition(" ") for line in page.read().decode().splitlines() if not line.startswith("#"))
        series = {name: float(value) for name, _, value in lines}
        found = {name: series[metric] for name, metric in METRICS.items()}
        found["server MiB"] /= MIB
        return found

    def _redis(self) -> "redis.Redis":
        holder = self._holder()
        return redis.Redis(unix_socket_path=f"{holder['socket_dir']}/redis.sock", socket_timeout=5)

    def _holder(self) -> dict[str, str]:
        found: dict[str, str] = json.loads((self._server.data_dir / "equipoise.lock").read_text())
        return found

    def _change_visitor(self) -> None:
        if self._visitor is not None:
            if self._chance.random() < 0.5:
                self._visitor.kill()
                self.counts["visitors killed"] += 1
            elif complaint := self._visitor.stop():
                self.complaints.append(f"{self.name}: visitor {complaint}")
        self._visitor = Trainer("visitor", self._server.address, seed=self._chance.randrange(2**31))
        self.counts["visitors"] += 1

    def _kill_server(self) -> None:
        self._server.restart()
        self.counts["server kills"] += 1

    def _pause_redis(self) -> None:
        pid = int(self._holder()["redis_pid"])
        os.kill(pid, signal.SIGSTOP)
        sleep(REDIS_PAUSE_S)
        os.kill(pid, signal.SIGCONT)
        self.counts["redis pauses"] += 1
