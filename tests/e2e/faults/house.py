"""A server behind a proxy, before a Redis behind a proxy: what most tests of faults begin with."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.e2e.faults.proxy import FaultProxy
from tests.e2e.faults.redis_server import RedisServer
from tests.e2e.faults.zygote import ForkedServer, Zygote


class House:
    """Real processes with everything between them in the test's hands; `close` ends them all.

    Attributes:
        redis: the Redis.
        to_redis: the proxy before it.
        server: the first server.
        to_server: the proxy before it, where trainers connect to.
    """

    def __init__(self, directory: Path, zygote: Zygote) -> None:
        self._directory = directory
        self._zygote = zygote
        self._stack = ExitStack()
        self._servers = 0
        self.redis = RedisServer(directory / "redis")
        self.redis.start()
        self._stack.callback(self.redis.kill)
        self.to_redis = self.proxy(self.redis.port)
        self.server, self.to_server = self.serve()

    @property
    def address(self) -> str:
        """Where trainers find the first server."""
        return self.to_server.address

    def proxy(self, port: int) -> FaultProxy:
        """A proxy before a port of this machine."""
        return self._stack.enter_context(FaultProxy(("127.0.0.1", port)))

    def serve(
        self, *, to_redis: FaultProxy | None = None, own_redis: bool = False, **settings: Any
    ) -> tuple[ForkedServer, FaultProxy]:
        """Another server on the same Redis, with a proxy before it that it tells trainers of."""
        self._servers += 1
        before_redis = to_redis or self.to_redis
        before = FaultProxy(("127.0.0.1", 1))
        # Tests name the server that owns a policy: the one that was asked first.
        shared = {} if own_redis else {"redis_url": f"redis://{before_redis.address}", "spread_policies": False}
        settings = {"advertise": before.address} | shared | settings
        server = ForkedServer(self._zygote, self._directory / f"server-{self._servers}", **settings)
        self._stack.callback(server.kill)
        self._stack.callback(before.close)
        server.start()
        before.target = ("127.0.0.1", int(server.address.rpartition(":")[2]))
        return server, before

    def close(self) -> None:
        """Ends every process."""
        self._stack.close()
