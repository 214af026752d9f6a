"""Settings of a client as values: deadlines, backoff, and how many steps may wait."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeout:
    """Deadlines, seconds.

    Example:
        >>> Timeout(step=0.2)  # training waits at most 0.2 s for weights, then goes on with older ones
        Timeout(step=0.2, wait=300.0, connect=5.0, call=10.0, close=5.0)

    Attributes:
        step: longest wait of a step or read with `when_lost="continue"`.
        wait: longest wait of a step or read with `when_lost="wait"`.
        connect: longest wait for a stream to open; a step before the first opening waits this long, if longer.
        call: deadline of every other call. Calls that stream have none: a lost server ends them within 15 s.
        close: longest time that `close` takes, submitted steps included.
    """

    step: float = 1.0
    wait: float = 300.0
    connect: float = 5.0
    call: float = 10.0
    close: float = 5.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            _check_positive(f"timeout.{name}", getattr(self, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Exponential backoff with full jitter: attempt k waits a uniform random time in [0, min(longest, first·2^k)].

    Attributes:
        first: upper bound of the first wait, seconds.
        longest: upper bound of every wait, seconds.
    """

    first: float = 0.1
    longest: float = 2.0

    def __post_init__(self) -> None:
        _check_positive("backoff.first", self.first)
        _check_positive("backoff.longest", self.longest)

    def delay(self, attempt: int, random: Callable[[], float]) -> float:
        """Wait before attempt `attempt` (from 0), seconds; `random` gives uniform numbers in [0, 1)."""
        # 2**64 s is beyond any bound: the exponent is capped so that a long outage does not grow an integer.
        return random() * min(self.longest, self.first * 2.0 ** min(attempt, 64))


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much a client keeps.

    Attributes:
        window_steps: steps kept until they are durable, for replay.
        window_bytes: their size together, bytes.
        in_flight: steps and reads sent and not yet answered.
        cached_examples: examples whose newest weight is kept; 20 bytes each. Up to this many examples the cache is
            complete; above it a new weight takes the place of an older one.
    """

    window_steps: int = 4096
    window_bytes: int = 64 << 20
    in_flight: int = 64
    cached_examples: int = 1 << 22

    def __post_init__(self) -> None:
        for name in self.__slots__:
            _check_positive(f"limits.{name}", getattr(self, name))


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} = {value}: must be positive")
