"""Where Redis is and how to enter: URLs and credentials, parsed by hand so that no message ever repeats a secret."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias
from urllib.parse import parse_qsl, unquote

Topology: TypeAlias = Literal["single", "sentinel", "cluster"]

_PORTS: dict[Topology, int] = {"single": 6379, "sentinel": 26379, "cluster": 6379}
_SCHEMES: dict[str, tuple[Topology, bool]] = {
    "redis": ("single", False),
    "rediss": ("single", True),
    "unix": ("single", False),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
}
SCHEMES = tuple(_SCHEMES)
"""What a URL may begin with; `rediss` is TLS."""

_SPECIAL = "/?#@"
_HOST = re.compile(r"(?P<name>\[[0-9a-fA-F:.%]+\]|[^\s:\[\]]+)(?::(?P<port>\d{1,5}))?")
_OPTION = re.compile(r"[A-Za-z_]{1,32}")


@dataclass(frozen=True, kw_only=True)
class RedisUrl:
    """A Redis, the Sentinels that know one, or nodes of a cluster. As text, it is without its password.

    Attributes:
        topology: what answers at `hosts`.
        hosts: (name, port) each; none for a Unix socket.
        socket: path of a Unix socket; empty: `hosts`.
        tls: whether every connection is TLS, those to Sentinels too.
        database: number of the database; a cluster has 0 alone.
        master: name under which the Sentinels know the master.
        username: empty: Redis's default user.
        password: empty: none.
    """

    topology: Topology
    hosts: tuple[tuple[str, int], ...] = ()
    socket: str = ""
    tls: bool = False
    database: int = 0
    master: str = ""
    username: str = ""
    password: str = field(default="", repr=False)

    @classmethod
    def parse(cls, text: str) -> "RedisUrl":
        """Reads `redis[s]://[user:password@]host[:port][/database]`, `unix://[user:password@]/path[?db=n]`,
        `redis[s]+sentinel://[user:password@]host[:port],…/master[/database]` or
        `redis[s]+cluster://[user:password@]host[:port],…`. User and password are percent-encoded.

        Raises ValueError, which says what rule is broken and repeats nothing that could be a secret.
        """
        scheme, separator, rest = text.partition("://")
        if not separator or scheme not in _SCHEMES:
            raise ValueError(f"must start with one of {', '.join(f'{known}://' for known in SCHEMES)}")
        topology, tls = _SCHEMES[scheme]
        username, password, place = _credentials(rest, is_socket=scheme == "unix")
        if "#" in place:
            raise ValueError("must not contain '#'")
        place, _, query = place.partition("?")
        hosts, _, path = place.partition("/")
        options = _options(query, known=("db",) if topology == "single" else ())
        if scheme == "unix":
            if hosts or not path:
                raise ValueError("must name the path of a socket, as unix:///run/redis.sock does")
            database, socket, master = options.get("db", ""), f"/{path}", ""
        else:
            database, socket, master = path.strip("/"), "", ""
            if topology == "sentinel":
                master, _, database = database.partition("/")
                if not master:
                    raise ValueError("must name the master, as redis+sentinel://host:26379/master does")
            if topology == "cluster" and database:
                raise ValueError("must end with the hosts: a cluster has no databases")
            if database and options:
                raise ValueError("names the database twice, as a path and as db=")
            database = database or options.get("db", "")
        found = () if socket else _hosts(hosts, default_port=_PORTS[topology])
        if topology == "single" and len(found) > 1:
            raise ValueError("must have one host; several are Sentinels or a cluster")
        return cls(
            topology=topology,
            hosts=found,
            socket=socket,
            tls=tls,
            database=_database(database),
            master=master,
            username=username,
            password=password,
        )

    def __str__(self) -> str:
        scheme = next(
            name
            for name, facts in _SCHEMES.items()
            if facts == (self.topology, self.tls) and (name == "unix") == bool(self.socket)
        )
        user = f"{self.username}{':***' if self.password else ''}@" if self.username or self.password else ""
        hosts = ",".join(f"[{name}]:{port}" if ":" in name else f"{name}:{port}" for name, port in self.hosts)
        path = self.socket + "".join(f"/{part}" for part in (self.master, self.database or "") if part)
        return f"{scheme}://{user}{hosts}{path}"


@dataclass(frozen=True, kw_only=True)
class RedisAccess:
    """What a URL does not say: secrets that are kept apart from it, and how TLS is verified.

    Attributes:
        username, password: in place of those of the URL.
        sentinel_username, sentinel_password: for Sentinels, which have users of their own.
        tls_ca: PEM file of the authorities to trust; None: those of the system.
        tls_certificate, tls_key: PEM files that show Redis who we are.
        tls_check_hostname: whether a certificate must name the host that was asked for.
    """

    username: str = ""
    password: str = field(default="", repr=False)
    sentinel_username: str = ""
    sentinel_password: str = field(default="", repr=False)
    tls_ca: Path | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_check_hostname: bool = True


def _credentials(rest: str, *, is_socket: bool) -> tuple[str, str, str]:
    """User, password, and what follows them."""
    user, at, place = ("", "", rest) if is_socket and rest.startswith("/") else rest.rpartition("@")
    if not at:
        return "", "", place
    if any(each in user for each in _SPECIAL):
        raise ValueError(
            "holds one of / ? # @ before its last @: a user and a password need them percent-encoded"
            " (%2F %3F %23 %40), or redis_password_file"
        )
    name, _, password = user.partition(":")
    return unquote(name), unquote(password), place


def _options(query: str, *, known: tuple[str, ...]) -> dict[str, str]:
    options = dict(parse_qsl(query, keep_blank_values=True))
    for name in options:
        if name not in known:
            shown = repr(name) if _OPTION.fullmatch(name) else "that"
            raise ValueError(
                f"has no option {shown}"
                + (f"; known: {', '.join(known)}" if known else "")
                + "; TLS is rediss, secrets and certificates are settings: redis_password_file, redis_tls_ca, …"
            )
    return options


def _hosts(hosts: str, *, default_port: int) -> tuple[tuple[str, int], ...]:
    found = []
    for host in hosts.split(","):
        match = _HOST.fullmatch(host)
        if match is None or not 0 < int(match["port"] or default_port) < 65_536:
            rule = "must have a host" if not host else "must have hosts of the form name, name:port or [IPv6]:port"
            raise ValueError(rule)
        found.append((match["name"].strip("[]"), int(match["port"] or default_port)))
    return tuple(found)


def _database(text: str) -> int:
    if not (text or "0").isdecimal():
        raise ValueError("must have a number as its database")
    return int(text or 0)
