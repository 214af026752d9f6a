"""Engines for tests of the servicer."""

from tests.server.engine.conftest import redis, servers

__all__ = ["redis", "servers"]
