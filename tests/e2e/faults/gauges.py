"""What a server says of itself, and what the machine and its Redis say of it."""

import re
import urllib.error
import urllib.request
from typing import Protocol

import psutil

from tests.e2e.faults.redis_server import RedisServer

MIB = 1 << 20
PREFIX = "equipoise_server_"


class Measured(Protocol):
    """A server process that tells of itself."""

    @property
    def metrics_address(self) -> str:
        """Where its metrics are."""
        ...


def gauges(server: Measured, *, timeout_s: float = 60.0) -> dict[str, float]:
    """The metrics without labels, by name without the common prefix."""
    found = re.findall(rf"^{PREFIX}(\w+) (\S+)$", _page(server, timeout_s), re.MULTILINE)
    return {name: float(value) for name, value in found}


def calls_begun(server: Measured, method: str) -> int:
    """How many calls of an RPC have reached the server's code."""
    return _count(server, rf'grpc_server_started_total{{.*grpc_method="{method}".*}}')


def calls_ended(server: Measured, method: str, *, code: str) -> int:
    """How many calls of an RPC have ended with a code, in Go's spelling."""
    return _count(server, rf'grpc_server_handled_total{{grpc_code="{code}",grpc_method="{method}".*}}')


def store_errors(server: Measured, kind: str) -> int:
    """How many commands to Redis have failed, by kind."""
    return _count(server, rf'{PREFIX}redis_errors_total{{kind="{kind}"}}')


def refusals(server: Measured, reason: str) -> int:
    """How many calls and steps it has refused for a reason of how things stand."""
    return _count(server, rf'{PREFIX}refusals_total{{reason="{reason}"}}')


def not_ready(server: Measured) -> str:
    """Why the server is not ready; empty when it is."""
    try:
        urllib.request.urlopen(f"http://{server.metrics_address}/healthz", timeout=60).close()
    except urllib.error.HTTPError as error:
        with error:
            return error.read().decode().lower()
    return ""


def _count(server: Measured, series: str) -> int:
    found = re.search(rf"^{series} (\S+)$", _page(server, 60.0), re.MULTILINE)
    return int(float(found[1])) if found else 0


def _page(server: Measured, timeout_s: float) -> str:
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=timeout_s) as page:
        text: str = page.read().decode()
    return text


def own_bytes(pid: int) -> int:
    """Memory that a process has taken. Its RSS also counts pages of libraries, which the system takes back at will."""
    memory = psutil.Process(pid).memory_info()
    return int(memory.rss - memory.shared)


def log_start(redis: RedisServer, policy: str) -> int:
    """First version that the policy's log in Redis still has, or would have if it had one."""
    with redis.client() as client:
        logs = [client.xinfo_stream(key) for key in client.scan_iter(f"*{{{policy}}}*:log")]
    starts = [log["first-entry"][0] if log["first-entry"] else _next(log["last-generated-id"]) for log in logs]
    return max((_version(entry_id) for entry_id in starts), default=0)


def _next(entry_id: bytes) -> bytes:
    return b"%d-0" % (_version(entry_id) + 1)


def _version(entry_id: bytes) -> int:
    return int(entry_id.split(b"-")[0])
