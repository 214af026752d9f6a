"""Which of a service's servers is asked: the next one when one is lost, the owner where another is named."""

from equipoise.channel import Server
from equipoise.errors import (
    DeadlineError,
    EquipoiseError,
    InvalidRequestError,
    OverloadedError,
    OwnershipError,
    UnavailableError,
)
from equipoise.security import Security

OWNER = "owner"
"""Name of the owner's address in the metadata of an `OwnershipError`."""

_LISTS_OF_GRPC = ("ipv4:", "ipv6:")
"""Targets that gRPC itself takes several addresses in."""


class Route:
    """The servers of one service, and which of them is asked now.

    Args:
        address: `host:port`, or several with commas between them.
        security: TLS and token, for all of them.
    """

    def __init__(self, address: str, security: Security | None) -> None:
        parts = [address] if address.startswith(_LISTS_OF_GRPC) else [part.strip() for part in address.split(",")]
        if not all(parts):
            raise InvalidRequestError(field="address", value=repr(address), rule="must be host:port[,host:port]...")
        first = Server.at(parts[0], security)
        self.security = first.security
        self._listed = [first, *(Server(part, self.security) for part in parts[1:])]
        self._position = 0
        self._owner: Server | None = None

    @property
    def server(self) -> Server:
        """The server to ask now."""
        return self._owner or self._listed[self._position]

    @property
    def attempts(self) -> int:
        """How often a call is worth trying: each listed server, and the owner that one of them names."""
        return len(self._listed) + 1

    def turn(self, error: EquipoiseError | None) -> bool:
        """Chooses the next server after an error, or when this one asked to leave; whether it is another one."""
        before = self.server
        if isinstance(error, OwnershipError) and (owner := self._named(error)):
            self._owner = owner
        elif error is None or isinstance(error, UnavailableError):
            if self._owner is None:
                self._position = (self._position + 1) % len(self._listed)
            self._owner = None
        return self.server != before

    def repeats(self, error: EquipoiseError, *, method: str) -> bool:
        """Turns after a failed call; whether another server is worth the same call."""
        turned = self.turn(error)
        if isinstance(error, DeadlineError | OverloadedError):  # its time is used up
            return False
        # A deletion that found its server but not the way back must not be told that there is no such policy.
        return turned and (isinstance(error, OwnershipError) or method != "DeletePolicy")

    def _named(self, error: OwnershipError) -> Server | None:
        """The owner, unless its address is unusable: the token must not travel to it unencrypted."""
        try:
            return Server(error.metadata[OWNER], self.security)
        except (KeyError, InvalidRequestError):
            return None
