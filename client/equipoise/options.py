"""The options of a client as values: deadlines, backoff, limits, and what a step does when the server is lost."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Literal, Protocol, TypeAlias, get_args

from equipoise.errors import is_integer, require
from equipoise.policies import PolicySpec
from equipoise.results import Stats

WhenLost: TypeAlias = Literal["continue", "wait"]
"""What a step does when the server is lost: go on with the newest weights known, or wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeout:
    """Deadlines of a client, seconds. All are positive.

    Example:
        >>> Timeout(step=0.2)  # training waits at most 0.2 s for weights, then goes on with older ones
        Timeout(step=0.2, wait=300.0, connect=5.0, call=10.0, close=5.0)

    Attributes:
        step: longest wait of a step or read with `when_lost="continue"`.
        wait: longest wait of a step or read with `when_lost="wait"`.
        connect: longest wait for a connection. A step before the first connection waits this long, if it is longer.
        call: deadline of every other call. Calls that stream have none; a lost server ends them within 15 s.
        close: longest time that `close` takes, submitted steps included.

    Raises:
        InvalidRequestError: a deadline is not a positive number.
    """

    step: float = 1.0
    wait: float = 300.0
    connect: float = 5.0
    call: float = 10.0
    close: float = 5.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            _check_seconds(f"timeout.{name}", getattr(self, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Waits between attempts to connect: exponential, with full jitter.

    Attempt k, from 0, waits a uniform random time in [0, min(longest, first·2^k)].

    Attributes:
        first: upper bound of the first wait, seconds.
        longest: upper bound of every wait, seconds.

    Raises:
        InvalidRequestError: a bound is not a positive number.
    """

    first: float = 0.1
    longest: float = 2.0

    def __post_init__(self) -> None:
        _check_seconds("backoff.first", self.first)
        _check_seconds("backoff.longest", self.longest)

    def delay(self, attempt: int, random: Callable[[], float]) -> float:
        """Wait before attempt `attempt` (from 0), seconds; `random` gives uniform numbers in [0, 1)."""
        # 2**64 s is beyond any bound: the exponent is capped so that a long outage does not grow an integer.
        return random() * min(self.longest, self.first * 2.0 ** min(attempt, 64))


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much a client keeps. All are positive integers.

    Attributes:
        window_steps: most steps that are kept for replay because they are not durable yet.
        window_bytes: most bytes that these steps take.
        in_flight: most steps and reads that are sent and not answered yet.
        cached_examples: number of examples whose newest weight is kept, 20 bytes each. If the policy has more, a new
            weight may take the place of an older one.

    Raises:
        InvalidRequestError: a limit is not a positive integer.
    """

    window_steps: int = 4096
    window_bytes: int = 64 << 20
    in_flight: int = 64
    cached_examples: int = 1 << 22

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            require(
                is_integer(value, 1, 1 << 63), field=f"limits.{name}", value=value, rule="must be a positive integer"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOptions:
    """How a session behaves; `equipoise.PolicyClient` takes the same options.

    Attributes:
        spec: the policy. With `num_examples` 0 it must exist already.
        when_lost: whether steps go on without the server or wait for it.
        max_staleness: how many steps older than the newest step weights may be and still be used.
        timeout: deadlines.
        backoff: waits between attempts to connect.
        limits: how much is kept.
    """

    spec: PolicySpec
    when_lost: WhenLost
    max_staleness: int
    timeout: Timeout
    backoff: Backoff
    limits: Limits

    def __post_init__(self) -> None:
        fits = self.when_lost in get_args(WhenLost)
        require(fits, field="when_lost", value=self.when_lost, rule="must be 'continue' or 'wait'")
        fits = is_integer(self.max_staleness, 0, 1 << 63)
        require(fits, field="max_staleness", value=self.max_staleness, rule="must be an integer, 0 or more")
        for name, kind in (("timeout", Timeout), ("backoff", Backoff), ("limits", Limits)):
            value = getattr(self, name)
            require(isinstance(value, kind), field=name, value=value, rule=f"must be an equipoise.{kind.__name__}")

    @property
    def continues(self) -> bool:
        """Whether training goes on without the server."""
        return self.when_lost == "continue"

    def patience(self, *, connected_before: bool) -> float:
        """How long the caller of a step waits, seconds; the first connection may take longer."""
        if not self.continues:
            return self.timeout.wait
        return self.timeout.step if connected_before else max(self.timeout.step, self.timeout.connect)


class Client(Protocol):
    """What metrics ask a client."""

    @property
    def stats(self) -> Stats:
        """The client's counters, as a copy."""
        ...


class ClientMetrics(Protocol):
    """Shows what clients see; `equipoise.metrics` has one for Prometheus and one for OpenTelemetry. Thread-safe."""

    def joined(self, client: Client, options: SessionOptions) -> None:
        """A client was made."""
        ...

    def left(self, client: Client) -> None:
        """A client was closed."""
        ...

    def answered(self, policy: str, seconds: float) -> None:
        """A step or read was answered by the server, so long after its call. Must not block."""
        ...


def _check_seconds(field: str, value: object) -> None:
    fits = isinstance(value, Real) and 0 < float(value) < math.inf
    require(fits, field=field, value=value, rule="must be a positive number of seconds")
