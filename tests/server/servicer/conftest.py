"""Engines and bounds for tests of the servicer."""

from equipoise_server.servicer import ServiceLimits
from tests.server.engine.conftest import redis, servers

__all__ = ["LIMITS", "redis", "servers"]

LIMITS = ServiceLimits(
    max_batch_examples=262_144,
    max_examples=1 << 40,
    max_message_bytes=1 << 24,
    max_streams=1,
    max_import_bytes=1 << 30,
    max_inflight_bytes=1 << 30,
    max_tenant_inflight_bytes=1 << 29,
    write_timeout_s=60.0,
    first_message_timeout_s=10.0,
    build_version="",
    device="cpu",
)
