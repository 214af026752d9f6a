"""A Redis and engines on it, as the engine's tests have them."""

from tests.server.engine.conftest import redis, servers

__all__ = ["redis", "servers"]
