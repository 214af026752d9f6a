"""The policy servers that are compared: each with a Redis of its own, in plain text, with TLS, of several processes."""

import json
import random
import socket
import subprocess
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from equipoise.security import Security
from equipoise.testing import ServerProcess, serve
from equipoise_server.bench.processes import children
from equipoise_server.security import Scope, entry, new_token

PLAIN, TLS, TLS_AND_TOKEN = SECURITIES = ("plain", "tls", "tls+token")
CERTIFICATE = (
    *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"),
    *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
)
LARGEST_STEP = 65536
PORTS = 20_000, 30_000
"""Of servers of several processes, each of which has one of its own."""


class NoTLSError(Exception):
    """There is no certificate to serve with; the message says why."""


@dataclass(frozen=True, slots=True)
class PolicyServer:
    """One that serves.

    Attributes:
        process: it.
        security: how it is reached: `plain`, `tls` or `tls+token`.
        processes: how many it consists of.
        credentials: of those who reach it.
    """

    process: ServerProcess
    security: str
    processes: int
    credentials: Security

    @property
    def address(self) -> str:
        """`host:port`."""
        return self.process.address

    def address_of(self, policy: int) -> str:
        """`host:port` of the process that has policy number so and so: equally many for each, and none moves."""
        if self.processes == 1:
            return self.address
        host, _, port = self.address.rpartition(":")
        return f"{host}:{int(port) + 1 + policy % self.processes}"

    @property
    def redis_pid(self) -> int:
        """Process id of its Redis."""
        return int(json.loads((self.process.data_dir / "equipoise.lock").read_text())["redis_pid"])

    @property
    def pids(self) -> list[int]:
        """Process ids of all that it consists of, without its Redis."""
        first = self.process.pid
        return [first, *(pid for pid in children(first) if pid != self.redis_pid)] if self.processes > 1 else [first]


def start(stack: ExitStack, *, security: str, processes: int, rows: int) -> PolicyServer:
    """A server that takes steps of so many rows, and ends with the stack.

    Raises NoTLSError, UnavailableError.
    """
    settings, credentials = _guard(stack, security)
    if processes > 1:
        alone = {"listen": f"127.0.0.1:{_free_ports(1 + processes)}", "spread_policies": "false"}
        settings |= {"processes": processes, **alone}
    process = stack.enter_context(serve(max_batch_examples=max(LARGEST_STEP, rows), **settings))
    return PolicyServer(process, security, processes, credentials)


def _free_ports(count: int) -> int:
    """The first of so many ports one behind the other, below those that the system gives to connections."""
    while True:
        first = random.randrange(*PORTS)
        with ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
        return first


def _guard(stack: ExitStack, security: str) -> tuple[dict[str, str | int | Path], Security]:
    if security == PLAIN:
        return {}, Security()
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="equipoise-")))
    certificate, key, tokens = (folder / name for name in ("server.pem", "server.key", "tokens.toml"))
    try:
        made = subprocess.run([*CERTIFICATE, "-out", certificate, "-keyout", key], capture_output=True, text=True)
    except OSError as error:
        raise NoTLSError(f"openssl, which makes a certificate for it: {error.strerror}") from None
    if made.returncode:
        raise NoTLSError(f"openssl made no certificate: {made.stderr.strip()}")
    settings: dict[str, str | int | Path] = {"tls_certificate": certificate, "tls_key": key}
    if security == TLS:
        return settings, Security(root_certificates=certificate)
    token, kept = new_token(tenant="bench", scopes=Scope)
    tokens.write_text(f'[tenants.bench]\nprefix = ""\n{entry(kept)}')
    return {**settings, "tokens_file": tokens}, Security(root_certificates=certificate, token=token)
