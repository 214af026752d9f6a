"""Ports that several processes listen at, kept by their parent while one of them is away."""

import errno
import socket
from collections.abc import Iterator
from typing import Any

from equipoise_server.addresses import bindable, host_and_port, joined
from equipoise_server.settings import SettingsError

NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""What binding ends with where this machine lacks an address that a name has; gRPC does without it, too."""


class Port:
    """An address that is bound here and at which others listen (SO_REUSEPORT).

    The kernel shares connections out among those who listen. A socket that is bound and does not listen gets none; it
    keeps other programs away.

    Args:
        address: HOST:PORT; port 0: a free one.
        setting: names the address in errors.

    Raises:
        SettingsError: it cannot be bound, or somebody listens there already.
    """

    def __init__(self, address: str, *, setting: str) -> None:
        host, port = host_and_port(bindable(address))
        self._sockets: list[socket.socket] = []
        lacking: OSError | None = None
        try:
            for family, place in _places(host, port):
                try:
                    self._sockets.append(_kept(family, (place[0], port or self._port, *place[2:])))
                except OSError as error:
                    if error.errno not in NOT_HERE:
                        raise
                    lacking = error
            if not self._sockets and lacking:
                raise lacking
        except OSError as error:
            self.close()
            message = f"{setting}: {address!r} cannot be bound, {error.strerror or error}; is another server there?"
            raise SettingsError(message) from error
        self.address = joined(host, self._port)

    @property
    def _port(self) -> int:
        return int(self._sockets[0].getsockname()[1]) if self._sockets else 0

    def close(self) -> None:
        """Lets go of it."""
        for bound in self._sockets:
            bound.close()


def _places(host: str, port: int) -> Iterator[tuple[socket.AddressFamily, tuple[Any, ...]]]:
    for family, _, _, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE):
        if family in (socket.AF_INET, socket.AF_INET6):
            yield family, place


def _kept(family: socket.AddressFamily, place: tuple[Any, ...]) -> socket.socket:
    with _bound(family, place, socket.SO_REUSEADDR) as alone:
        alone.listen(1)  # alone: fails where another one listens, sharing or not
        place = alone.getsockname()
    kept = _bound(family, place, socket.SO_REUSEADDR, socket.SO_REUSEPORT)
    # What counts when somebody else comes: without it, one who does not share finds the address taken.
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    return kept


def _bound(family: socket.AddressFamily, place: tuple[Any, ...], *options: int) -> socket.socket:
    """SO_REUSEADDR: whatever connections have lately ended there."""
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        for option in options:
            made.setsockopt(socket.SOL_SOCKET, option, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(place[0] != "::"))
        made.bind(place)
    except OSError:
        made.close()
        raise
    return made
