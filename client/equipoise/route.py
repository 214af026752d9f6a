"""Which of a service's servers is asked: the next one when one is lost, the owner where another is named."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from time import monotonic

from equipoise.channel import Server
from equipoise.errors import (
    OWNER,
    DeadlineError,
    EquipoiseError,
    InvalidRequestError,
    OverloadedError,
    OwnershipError,
    ServerBugError,
    UnavailableError,
    require,
)
from equipoise.security import Security

logger = logging.getLogger("equipoise")

PLACEMENT_HEADER = "x-equipoise-placement"
"""Metadata of a call that has been sent on: where the policy should be if no server owns it."""
SENT_HERE, MUST_STAY = "here", "stay"

_LISTS_OF_GRPC = ("ipv4:", "ipv6:")
"""Targets that gRPC itself takes several addresses in."""

_ONCE = ("DeletePolicy", "ImportPolicy")
"""Calls that may have had their effect and lost only the answer: a second one would be told of a conflict with it."""


FIRST_ABSENCE_S, LONGEST_ABSENCE_S = 1.0, 60.0
"""How long an owner's address is not tried again that could not be reached; twice as long each time."""

MAX_ABSENCES = 256
"""Addresses that are remembered as unreachable; of more, the oldest are forgotten."""


@dataclass(slots=True)
class _Absence:
    """An owner's address that could not be reached: how often, and when it is tried again (clock, seconds)."""

    failures: int = 0
    until: float = 0.0


class Route:
    """The servers of one service, and which of them is asked now.

    An owner whose address cannot be reached is not followed for a while: what was listed is asked again, as it may be a
    name of many servers, or know a new owner. The same where a server names an owner at the address it was asked at.

    Args:
        address: `host:port`, or several with commas between them.
        security: TLS and token, for all of them.
        clock: seconds.
    """

    def __init__(self, address: str, security: Security | None, *, clock: Callable[[], float] = monotonic) -> None:
        require(isinstance(address, str), field="address", value=address, rule="must be host:port[,host:port]...")
        parts = [address] if address.startswith(_LISTS_OF_GRPC) else [part.strip() for part in address.split(",")]
        require(all(parts), field="address", value=address, rule="must be host:port[,host:port]...")
        first = Server.at(parts[0], security)
        self.security = first.security
        self._listed = [first, *(Server(part, self.security) for part in parts[1:])]
        self._position = 0
        self._owner: Server | None = None
        self._clock = clock
        self._absent: dict[str, _Absence] = {}

    @property
    def server(self) -> Server:
        """The server to ask now."""
        return self._owner or self._listed[self._position]

    def headers(self, server: Server, policy: str = "") -> tuple[tuple[str, str], ...]:
        """Metadata of a call to a server: the token, the policy it is about, and what is known of that one's place."""
        place = SENT_HERE if server == self._owner else MUST_STAY if self._absent else ""
        return (*server.headers(policy), *(((PLACEMENT_HEADER, place),) if policy and place else ()))

    @property
    def attempts(self) -> int:
        """How often a call is worth trying: each listed server, and the owner that one of them names."""
        return len(self._listed) + 1

    def turn(self, error: EquipoiseError | None, *, asked: Server | None = None, answered: bool = False) -> bool:
        """Chooses the next server after an error, or when the one asked told us to leave.

        Args:
            error: what the call ended with; None: the server told us to leave.
            asked: the server that was asked; None: that of now.
            answered: whether it had said anything before the error.

        Returns:
            Whether the server to ask now is another one than the one that was asked.
        """
        asked = asked or self.server
        unreached = False
        if asked == self._owner:
            # A server's own errors carry a reason; without one it may be somebody else who answers at this address.
            unreached = isinstance(error, UnavailableError | ServerBugError) and not (error.reason or answered)
            self._note(asked, error if unreached else None)
        if self.server != asked:  # another call of this client has turned already
            return True
        if isinstance(error, OwnershipError) and (owner := self._named(error)) and owner.address != asked.address:
            self._owner = owner
        elif unreached or error is None or isinstance(error, UnavailableError):
            if self._owner is None:
                self._ask_next(anew=error is not None and OWNER in error.metadata)
            self._owner = None
        return self.server != asked

    @staticmethod
    def repeats(error: EquipoiseError, *, method: str) -> bool:
        """Whether a failed call is worth another attempt, at this server or another."""
        if not isinstance(error, UnavailableError) or isinstance(error, DeadlineError | OverloadedError):
            return False  # it is no matter of the server, or the call's time is used up
        return isinstance(error, OwnershipError) or method not in _ONCE

    def _named(self, error: OwnershipError) -> Server | None:
        """The owner, unless it was out of reach just now, or is unusable: no token must travel to it unencrypted."""
        try:
            owner = Server(error.metadata[OWNER], self.security)
        except (KeyError, InvalidRequestError):
            return None
        absence = self._absent.get(owner.address)
        return None if absence is not None and self._clock() < absence.until else owner

    def _ask_next(self, *, anew: bool) -> None:
        """Turns to the next listed server; `anew`: not over its old connection, which may lead to the same of many."""
        self._position = (self._position + 1) % len(self._listed)
        if anew:
            server = self._listed[self._position]
            self._listed[self._position] = replace(server, connection=server.connection + 1)

    def _note(self, owner: Server, error: EquipoiseError | None) -> None:
        """Remembers whether an owner could be reached; None: it could."""
        if error is None:
            self._absent.pop(owner.address, None)
            return
        if owner.address not in self._absent:
            logger.warning(
                "the policy's owner is said to be at %s, which cannot be reached (%s): asking %s again; its setting"
                " `advertise` must be an address that trainers can use",
                owner.address,
                error,
                self._listed[self._position].address,
            )
        absence = self._absent.setdefault(owner.address, _Absence())
        absence.until = self._clock() + min(LONGEST_ABSENCE_S, FIRST_ABSENCE_S * 2.0 ** min(absence.failures, 16))
        absence.failures += 1
        if len(self._absent) > MAX_ABSENCES:
            del self._absent[next(iter(self._absent))]
