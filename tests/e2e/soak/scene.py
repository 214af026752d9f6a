"""One server with its trainers and its faults, and what is sampled of them."""

import json
import os
import random
import signal
import urllib.request
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from time import monotonic, sleep
from typing import TypeAlias

import psutil
import redis

from equipoise.testing import ServerProcess
from tests.e2e.faults.proxy import FaultProxy
from tests.e2e.faults.redis_server import RedisServer
from tests.e2e.soak.trainers import Trainer
from tests.e2e.soak.verdict import MIB

Sample: TypeAlias = dict[str, float]

VISIT_EVERY_S = 8.0
METRICS = {
    "server MiB": "process_resident_memory_bytes",
    "files": "process_open_fds",
    "tasks": "equipoise_server_event_loop_tasks",
    "policies": "equipoise_server_policies",
    "trainers known": "equipoise_server_clients_remembered",
}


class Scene(ABC):
    """A server under load and faults.

    Args:
        server: it runs.
        chance: decides about everything.
    """

    name = ""
    fault_every_s = 0.0
    """On average."""
    veterans = ("steady", "steady")
    """Kinds of the trainers that stay."""

    def __init__(self, server: ServerProcess, *, chance: random.Random) -> None:
        self.complaints: list[str] = []
        self.counts: Counter[str] = Counter()
        self._server = server
        self._chance = chance
        self._veterans = [Trainer(kind, server.address, seed=chance.randrange(2**31)) for kind in self.veterans]
        self._visitor: Trainer | None = None
        self._due: dict[Callable[[], None], tuple[float, float]] = {}
        for act, period in ((self._change_visitor, VISIT_EVERY_S), (self.fault, self.fault_every_s)):
            self._due[act] = (monotonic() + period * (0.5 + chance.random()), period)

    @abstractmethod
    def fault(self) -> None:
        """Does to the server what is done to it in this scene, and counts it."""

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
            with self.connect() as client:
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

    def connect(self) -> "redis.Redis[bytes]":
        """A connection to the server's Redis."""
        return redis.Redis(unix_socket_path=f"{self.holder['socket_dir']}/redis.sock", socket_timeout=5)

    @property
    def holder(self) -> dict[str, str]:
        """What the server says of its own Redis."""
        found: dict[str, str] = json.loads((self._server.data_dir / "equipoise.lock").read_text())
        return found

    def _metrics(self) -> Sample:
        with urllib.request.urlopen(f"http://{self._server.metrics_address}/metrics", timeout=10) as page:
            lines = (line.rpartition(" ") for line in page.read().decode().splitlines() if not line.startswith("#"))
        series = {name: float(value) for name, _, value in lines}
        found = {name: series[metric] for name, metric in METRICS.items()}
        found["server MiB"] /= MIB
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


class Steady(Scene):
    """The server lives on; its Redis is paused now and then."""

    name = "steady"
    fault_every_s = 30.0
    pause_s = 1.5

    def fault(self) -> None:
        """See the class."""
        pid = int(self.holder["redis_pid"])
        os.kill(pid, signal.SIGSTOP)
        sleep(self.pause_s)
        os.kill(pid, signal.SIGCONT)
        self.counts["redis pauses"] += 1


class Killed(Scene):
    """The server is killed and started again and again."""

    name = "killed"
    fault_every_s = 40.0

    def fault(self) -> None:
        """See the class."""
        self._server.restart()
        self.counts["server kills"] += 1


class Distant(Scene):
    """The server lives on; its Redis is another machine's, now near, now far, and slower than bursts of large steps.

    Args:
        server: it runs.
        redis: what it uses.
        to_redis: the way there.
        chance: decides about everything.
    """

    name = "distant"
    fault_every_s = 12.0
    veterans = ("steady", "bursting")
    one_way_s = (0.0, 0.001, 0.010)

    def __init__(
        self, server: ServerProcess, *, redis: RedisServer, to_redis: FaultProxy, chance: random.Random
    ) -> None:
        self._shared = redis
        self._to_redis = to_redis
        super().__init__(server, chance=chance)

    def fault(self) -> None:
        """See the class."""
        others = [way_s for way_s in self.one_way_s if way_s != self._to_redis.delay_s]
        self._to_redis.delay_s = self._chance.choice(others)
        self.counts[f"redis {2e3 * self._to_redis.delay_s:.0f} ms away"] += 1

    def connect(self) -> "redis.Redis[bytes]":
        """A connection past the way that is slow."""
        return self._shared.client()
