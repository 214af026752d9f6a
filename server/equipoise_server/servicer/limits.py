"""Bounds of the service."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceLimits:
    """Bounds and facts of the service.

    Attributes:
        max_batch_examples: most rows of a step or read.
        max_examples: most examples of a policy; of a trajectory: most weights of all its rows together.
        max_message_bytes: largest message.
        max_streams: most open Exchange streams.
        max_import_bytes: memory for the policies that are being imported.
        max_inflight_bytes: bytes of requests that have come and are not answered.
        max_tenant_inflight_bytes: of one tenant; without tenants, of one policy.
        write_timeout_s: a stream whose answers nobody reads for so long ends.
        first_message_timeout_s: a stream that has not opened by then ends.
        build_version: version of the build.
        device: name of the device for people.
    """

    max_batch_examples: int
    max_examples: int
    max_message_bytes: int
    max_streams: int
    max_import_bytes: int
    max_inflight_bytes: int
    max_tenant_inflight_bytes: int
    write_timeout_s: float
    first_message_timeout_s: float
    build_version: str
    device: str
