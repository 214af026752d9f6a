"""Real Redis processes on loopback ports, which tests pause, kill and start again."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from equipoise_server.store import parent_bound
from equipoise_server.store.redis_binary import find_redis_server
from tests.debian import Program
from tests.e2e.faults.proxy import until
from tests.e2e.security.authority import Authority, Files
from tests.ports import free_port

NO_REWRITE = {"auto-aof-rewrite-percentage": "0"}
"""The append-only file keeps every command ever applied: it is the history of the log."""


@dataclass(frozen=True, kw_only=True)
class Guard:
    """What is in front of a Redis that takes no connection in plain text, and nobody without certificate and password.

    Attributes:
        program: a Redis with TLS.
        authority: signs all certificates.
        own: certificate of the Redis, and of whoever the tests are.
        password: of Redis's default user.
    """

    program: Program
    authority: Authority
    own: Files
    password: str

    def settings(self, port: int) -> dict[str, str]:
        """Of a Redis."""
        return {
            "port": "0",
            "tls-port": str(port),
            "tls-cert-file": str(self.own.certificate),
            "tls-key-file": str(self.own.key),
            "tls-ca-cert-file": str(self.authority.file),
            "tls-auth-clients": "yes",
            "tls-replication": "yes",
            "tls-cluster": "yes",
            "requirepass": self.password,
        }

    @property
    def options(self) -> dict[str, Any]:
        """Of a client."""
        return {
            "ssl": True,
            "ssl_ca_certs": str(self.authority.file),
            "ssl_certfile": str(self.own.certificate),
            "ssl_keyfile": str(self.own.key),
            "password": self.password,
        }


class RedisServer:
    """A Redis that keeps an append-only file in a directory.

    Attributes:
        port: its port; the same after a restart.
    """

    def __init__(self, directory: Path, *arguments: str, guard: Guard | None = None, **settings: str) -> None:
        directory.mkdir(exist_ok=True, parents=True)
        self.directory = directory
        self.port = free_port()
        self.guard = guard
        self._arguments = arguments
        self._settings = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "save": "",
            "appendonly": "yes",
            "maxmemory-policy": "noeviction",
            "logfile": "redis.log",
            **NO_REWRITE,
            **(guard.settings(self.port) | {"masterauth": guard.password} if guard else {}),
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
            with redis.Redis(unix_socket_path=str(self.directory / socket), socket_timeout=60) as client:
                until(lambda client=client: self._answers(client), what="redis has loaded its file")  # type: ignore[misc]
            self.kill()
            if self.append_only_file.stat().st_size >= before:
                return

    def _run(self, settings: dict[str, str]) -> None:
        # Bound to this process, so that a test that dies leaves nothing behind.
        program = self.guard.program if self.guard else Program(find_redis_server())
        bound = (sys.executable, "-I", "-S", parent_bound.__file__, str(os.getpid()), str(program.path))
        flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
        self._process = subprocess.Popen(
            [*bound, *self._arguments, *flags],
            cwd=self.directory,
            stdout=subprocess.DEVNULL,
            env=program.full_environment,
        )

    def kill(self) -> None:
        """Ends it at once (SIGKILL)."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(60)
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
        options = (self.guard.options if self.guard else {}) | options
        return redis.Redis(host="127.0.0.1", port=self.port, socket_timeout=60, **options)

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


class Sentinel(RedisServer):
    """A Sentinel that watches the master `policies`."""

    def __init__(
        self, directory: Path, *, master_port: int, quorum: int, down_after_ms: int, guard: Guard | None = None
    ) -> None:
        directory.mkdir(parents=True)
        configuration = directory / "sentinel.conf"
        configuration.write_text(
            f"sentinel monitor policies 127.0.0.1 {master_port} {quorum}\n"
            f"sentinel down-after-milliseconds policies {down_after_ms}\n"
            "sentinel failover-timeout policies 5000\n"
            + (f"sentinel auth-pass policies {guard.password}\n" if guard else "")
            + (f"sentinel sentinel-pass {guard.password}\n" if guard else "")
        )
        super().__init__(directory, str(configuration), "--sentinel", guard=guard)
        self._settings = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "logfile": "redis.log",
            **(guard.settings(self.port) if guard else {}),
        }


@contextmanager
def running(directory: Path, *, guard: Guard | None = None, **settings: str) -> Iterator[RedisServer]:
    """A Redis in a directory, until the end of the block."""
    server = RedisServer(directory, guard=guard, **settings)
    server.start()
    try:
        yield server
    finally:
        server.kill()


@contextmanager
def following(master: RedisServer, directory: Path, *, port: int = 0, **settings: str) -> Iterator[RedisServer]:
    """A replica of a master, which it reaches over `port` if one is given (a proxy's)."""
    with running(directory, guard=master.guard, **settings) as replica:
        replica.command("REPLICAOF", "127.0.0.1", port or master.port)
        until_in_step(replica)
        yield replica


@contextmanager
def running_cluster(directory: Path, *, masters: int, guard: Guard | None = None) -> Iterator[list[RedisServer]]:
    """The nodes of a cluster: its masters, then a replica of each, in the same order."""
    settings = {"cluster-enabled": "yes", "cluster-node-timeout": "2000"}
    with ExitStack() as stack:
        nodes = [
            stack.enter_context(running(directory / str(number), guard=guard, **settings))
            for number in range(2 * masters)
        ]
        size = -(-16_384 // masters)
        for number, master in enumerate(nodes[:masters]):
            master.command("CLUSTER", "ADDSLOTS", *range(number * size, min((number + 1) * size, 16_384)))
            master.command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for node in nodes[1:]:
            node.command("CLUSTER", "MEET", "127.0.0.1", nodes[0].port)
        for node in nodes:
            until(lambda node=node: known_to(node) == 2 * masters, what="the nodes have met")  # type: ignore[misc]
        for master, replica in zip(nodes[:masters], nodes[masters:], strict=True):
            replica.command("CLUSTER", "REPLICATE", identity(master))
            until_in_step(replica)
        for node in nodes:
            until(lambda node=node: cluster_is_up(node), what="the cluster is up")  # type: ignore[misc]
        yield nodes


def until_in_step(replica: RedisServer) -> None:
    """Returns once a replica follows its master."""
    with replica.client() as client:
        until(lambda: client.info("replication").get("master_link_status") == "up", what="it follows")


def cluster_is_up(node: RedisServer) -> bool:
    """Whether a node finds all slots served."""
    facts: Mapping[str, str] = node.command("CLUSTER INFO")
    return facts["cluster_state"] == "ok"


def known_to(node: RedisServer) -> int:
    """How many nodes it has shaken hands with, itself included."""
    nodes: Mapping[str, Mapping[str, Any]] = node.command("CLUSTER NODES")
    return sum("handshake" not in facts["flags"] for facts in nodes.values())


def identity(node: RedisServer) -> str:
    """What the cluster calls it."""
    found: bytes | str = node.command("CLUSTER MYID")
    return found if isinstance(found, str) else found.decode()
