"""The gRPC channel: its options, and the headers of every call."""

import json
from dataclasses import dataclass

import grpc

from equipoise.security import Security

MAX_MESSAGE_BYTES = 16 << 20
"""Largest message either side takes, bytes."""

POLICY_HEADER = "x-equipoise-policy"
"""Names the policy of a call, so that proxies can route without reading bodies."""

# A call that found no server is tried again; streams are reopened by the session, with replay.
_SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [
                {"service": "equipoise.v1.PolicyService", "method": method}
                for method in ("CreatePolicy", "GetPolicy", "ListPolicies", "SampleExamples", "GetServerInfo")
            ],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
    "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
}

OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A peer that is paused or cut off is noticed within 15 s. Without ping_timeout it takes a minute.
    ("grpc.keepalive_time_ms", 8_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # The session has its own backoff; the channel's must not slow it down.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 3_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # One connection per client: a shared one would outlive a fork and mix unrelated clients.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
)
"""Options of a channel."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server, and how it is reached.

    Attributes:
        address: `host:port`.
        security: TLS and token.
    """

    address: str
    security: Security

    def __post_init__(self) -> None:
        self.security.check_address(self.address)

    @classmethod
    def at(cls, address: str, security: Security | None) -> "Server":
        """The server; without `security`, what the environment says."""
        return cls(address, Security.from_environment() if security is None else security)

    def channel(self) -> grpc.Channel:
        """A new channel; connects when it is used."""
        credentials = self.security.credentials()
        if credentials is None:
            return grpc.insecure_channel(self.address, options=OPTIONS)
        return grpc.secure_channel(self.address, credentials, options=OPTIONS)

    def aio_channel(self) -> grpc.aio.Channel:
        """As `channel`, for asyncio."""
        credentials = self.security.credentials()
        if credentials is None:
            return grpc.aio.insecure_channel(self.address, options=OPTIONS)
        return grpc.aio.secure_channel(self.address, credentials, options=OPTIONS)

    def headers(self, policy: str = "") -> tuple[tuple[str, str], ...]:
        """Metadata of a call: the token, and the policy it is about, if it is about one."""
        return (*self.security.headers(), *(((POLICY_HEADER, policy),) if policy else ()))
