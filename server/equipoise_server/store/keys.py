"""How the keys in Redis are spelled; nobody else spells one.

All keys of a policy share the hash tag `{policy}`, hence one slot of a Redis Cluster. Log, pages and header carry
their *generation* too: what a half-finished deletion or republication leaves behind is never read as something else.
"""

from dataclasses import dataclass


def index_key(prefix: str) -> str:
    """The sorted set of all policies' names, in a slot of its own."""
    return f"{prefix}:index"


def heartbeat_key(prefix: str, instance: str) -> str:
    """Says that a server lives; expires unless it is renewed.

    Holds its address and, of one that takes policies, how many it has and the free bytes of its device.
    """
    return f"{prefix}:server:{instance}"


def leaving_key(prefix: str, instance: str) -> str:
    """Says that a server takes no callers any more and gives its policies up; expires with its heartbeat."""
    return f"{prefix}:leaving:{instance}"


def servers_key(prefix: str) -> str:
    """The sorted set of the servers that have sent heartbeats, in a slot of its own; some may be gone."""
    return f"{prefix}:servers"


def address_key(prefix: str, address: str) -> str:
    """The server that said last that it is reached at an address; expires. In a slot of its own."""
    return f"{prefix}:address:{address}"


def lock_key(prefix: str, name: str) -> str:
    """Says who holds a lock; expires. In a slot of its own."""
    return f"{prefix}:lock:{name}"


@dataclass(frozen=True, slots=True)
class PolicyKeys:
    """The keys of one policy."""

    prefix: str
    policy: str

    @property
    def _base(self) -> str:
        return f"{self.prefix}:{{{self.policy}}}"

    @property
    def spec(self) -> str:
        """Hash: uid, create_time, spec, generation, format."""
        return f"{self._base}:spec"

    @property
    def owner(self) -> str:
        """Hash: uid, token, epoch, address, instance, deleted (uid, after deletion).

        By generation, too: `pages:` (indices are below), `manifest:` (how many it names), `header:` (its version).
        """
        return f"{self._base}:owner"

    @property
    def staging(self) -> str:
        """Hash: the page being written, and the attempt that writes it."""
        return f"{self._base}:staging"

    def log(self, generation: str) -> str:
        """Stream of entries `<version>-0`."""
        return f"{self._base}:{generation}:log"

    def manifest(self, generation: str) -> str:
        """Hash: the version of every page that was written, by its index."""
        return f"{self._base}:{generation}:manifest"

    def header(self, generation: str) -> str:
        """Hash of what belongs to no page: progress, scalars, guard, the deduplication table."""
        return f"{self._base}:{generation}:progress"

    def page(self, generation: str, index: int) -> str:
        """Hash: version and the page's columns in pieces."""
        return f"{self._base}:{generation}:page:{index}"
