"""What the store keeps, as values; all payloads are opaque to it."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from equipoise_server.values import value


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPolicy:
    """A policy as it was created.

    Attributes:
        name: the policy's name, `[a-z0-9][a-z0-9._-]{0,127}`, already checked.
        uid: random, new for each creation; never contains `:` or braces.
        create_time: seconds since the Unix epoch.
        spec: JSON text of the resolved settings.
    """

    name: str
    uid: str
    create_time: float
    spec: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ownership:
    """The right to write one policy, valid until somebody else acquires or deletes it.

    Attributes:
        policy: name.
        uid: of the policy that was acquired.
        token: random, new for each acquisition; every write is compared with it.
        epoch: grows with each acquisition, across deletion and re-creation too.
        generation: which set of log and page keys holds the policy's data; `republish` starts a new one.
        address: where the owner can be reached.
        instance: the server that owns it, see `RedisStore.heartbeat`; empty: one that sends none.
    """

    policy: str
    uid: str
    token: str
    epoch: int
    generation: str
    address: str
    instance: str = ""


class Fence(Enum):
    """How an ownership stands."""

    HELD = "held"
    """Nobody else has acquired the policy since."""
    FENCED = "fenced"
    """Another server has."""
    RELEASED = "released"
    """It was given up, and nobody has acquired the policy since."""
    DELETED = "deleted"
    """The policy was deleted, and perhaps created again."""
    FORGOTTEN = "forgotten"
    """Redis has lost the policy, or was rolled back behind its acquisition."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Who holds a policy, for those who do not.

    Attributes:
        address: as given to `acquire`.
        epoch: of that acquisition.
    """

    address: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLoad:
    """What a server says of itself that takes policies.

    Attributes:
        policies: how many it has in memory, or on their way there.
        free_bytes: of its device's memory; None: nobody knows.
    """

    policies: int
    free_bytes: int | None = None


@value
class LogEntry:
    """One step in a policy's log.

    Attributes:
        version: from 1, without gaps.
        fields: opaque; empty for a refused step.
        seal: its checksum and that of the entry before it, see `checksums`; empty: none.
    """

    version: int
    fields: Mapping[str, bytes]
    seal: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """The columns of one range of examples.

    Attributes:
        version: the version of the policy the columns are current at.
        columns: opaque, of any size.
    """

    version: int
    columns: Mapping[str, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogState:
    """A policy's log from outside.

    Attributes:
        last_version: version of the last entry ever appended, known even when the log is empty; 0 at first.
        entries: entries not yet trimmed.
        bytes: memory of the log in Redis, an estimate.
    """

    last_version: int
    entries: int
    bytes: int


@dataclass(slots=True, kw_only=True)
class PageBatch:
    """Pages that are written one after another and trusted together.

    Attributes:
        id: random.
        pages: how many were written.
    """

    id: str = field(default_factory=lambda: secrets.token_hex(8))
    pages: int = 0
