"""What the engine reports about itself; the metrics module implements it."""

from typing import Protocol


class Telemetry(Protocol):
    """Receives facts; every method is cheap, thread-safe and never raises."""

    def step(self, *, policy: str, outcome: str, rows: int) -> None:
        """A step was `applied`, found a `duplicate`, or `refused`; or a `read` was answered."""
        ...

    def stage(self, *, method: str, stage: str, seconds: float) -> None:
        """A message of an RPC `method` spent `seconds` in `decode`, `queue`, `compute`, `log`, `encode` or `total`."""
        ...

    def batch(self, *, steps: int) -> None:
        """So many steps were applied in one device call."""
        ...

    def refused(self, *, reason: str) -> None:
        """A step was refused in its stream for `reason` (the ErrorInfo's)."""
        ...

    def fenced(self) -> None:
        """A write was refused because another server owns the policy."""
        ...

    def swept(self, *, ok: bool) -> None:
        """A sweep has ended, well or not."""
        ...

    def loaded(self, *, seconds: float) -> None:
        """A policy came into memory."""
        ...

    def not_loaded(self, *, reason: str) -> None:
        """A policy could not be brought into memory, for `reason` (the ErrorInfo's)."""
        ...

    def left(self, *, reason: str) -> None:
        """A policy has left memory, for `reason` (the ErrorInfo's)."""
        ...


class NoTelemetry:
    """Telemetry that nobody hears."""

    def step(self, *, policy: str, outcome: str, rows: int) -> None:
        """Ignored."""

    def stage(self, *, method: str, stage: str, seconds: float) -> None:
        """Ignored."""

    def batch(self, *, steps: int) -> None:
        """Ignored."""

    def refused(self, *, reason: str) -> None:
        """Ignored."""

    def fenced(self) -> None:
        """Ignored."""

    def swept(self, *, ok: bool) -> None:
        """Ignored."""

    def loaded(self, *, seconds: float) -> None:
        """Ignored."""

    def not_loaded(self, *, reason: str) -> None:
        """Ignored."""

    def left(self, *, reason: str) -> None:
        """Ignored."""
