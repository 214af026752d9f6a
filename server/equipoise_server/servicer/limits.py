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
        first_message_timeout_s: a stream that has not opened by then ends.
        build_version: version of the build.
        device: name of the device for people.
    """

    max_batch_examples: int
    max_examples: int
    max_message_bytes: int
    max_streams: int
    first_message_timeout_s: float
    build_version: str
    device: str
