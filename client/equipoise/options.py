"""How a session behaves."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from equipoise.config import Backoff, Limits, Timeout
from equipoise.errors import InvalidRequestError
from equipoise.policies import PolicySpec

WhenLost: TypeAlias = Literal["continue", "wait"]
"""What a step does when the server is lost: go on with the newest weights known, or wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOptions:
    """See `equipoise.PolicyClient` for the meaning.

    Attributes:
        spec: the policy; with num_examples 0 it must exist.
        when_lost: `continue` or `wait`.
        max_staleness: most steps that weights served before may be older than the newest step, to be used at all.
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
        if self.when_lost not in ("continue", "wait"):
            raise InvalidRequestError(field="when_lost", value=self.when_lost, rule="must be 'continue' or 'wait'")
        if self.max_staleness < 0:
            raise InvalidRequestError(field="max_staleness", value=self.max_staleness, rule="must not be negative")

    @property
    def continues(self) -> bool:
        """Whether training goes on without the server."""
        return self.when_lost == "continue"

    def patience(self, *, connected_before: bool) -> float:
        """How long the caller of a step waits, seconds; the first connection may take longer."""
        if not self.continues:
            return self.timeout.wait
        return self.timeout.step if connected_before else max(self.timeout.step, self.timeout.connect)
