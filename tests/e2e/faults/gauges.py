"""What a server says of itself, and what the machine and its Redis say of it."""

import re
import urllib.request

import psutil

from tests.e2e.faults.redis_server import RedisServer
from tests.e2e.faults.zygote import ForkedServer

MIB = 1 << 20
PREFIX = "equipoise_server_"


def gauges(server: ForkedServer, *, timeout_s: float = 10.0) -> dict[str, float]:
    """The metrics without labels, by name without the common prefix."""
    found = re.findall(rf"^{PREFIX}(\w+) (\S+)$", _page(server, timeout_s), re.MULTILINE)
    return {name: float(value) for name, value in found}


def calls_begun(server: ForkedServer, method: str) -> int:
    """How many calls of an RPC have reached the server's code."""
    found = re.search(
        rf'^grpc_server_started_total{{.*grpc_method="{method}".*}} (\S+)$', _page(server, 10.0), re.MULTILINE
    )
    return int(float(found[1])) if found else 0


def _page(server: ForkedServer, timeout_s: float) -> str:
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=timeout_s) as page:
        text: str = page.read().decode()
    return text


def resident_bytes(server: ForkedServer) -> int:
    """Memory that the server's process takes."""
    return int(psutil.Process(server.pid).memory_info().rss)


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
