"""What can go wrong in the store, as one tree; no Redis exception leaves this package."""

# ruff: noqa: N818 - named for what happened, as in `except Fenced`.

from equipoise_server.store.format import FORMAT


class StoreError(Exception):
    """Root of the tree."""


class Unavailable(StoreError):
    """Redis did not do what was asked: refused, stalled, read-only, full, still loading.

    A command that ended so may or may not have been applied. Every command of the store can be sent again.

    Attributes:
        kind: a short word for metrics, one of `UNAVAILABLE_KINDS`.
    """

    def __init__(self, message: str, *, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


UNAVAILABLE_KINDS = (
    "refused",
    "timeout",
    "disconnected",
    "exhausted",
    "oom",
    "readonly",
    "misconf",
    "loading",
    "busy",
    "auth",
    "cluster",
    "replicas",
    "evicts",
    "other",
)
"""Every value of `Unavailable.kind`, so that metrics can start at zero."""


class Fenced(StoreError):
    """Another owner holds the policy: this writer must stop writing it."""


class OwnedElsewhere(StoreError):
    """Another server owns the policy, and lives.

    Attributes:
        address: where it can be reached.
        leaving: whether it takes no callers any more and is about to give the policy up.
    """

    def __init__(self, policy: str, *, address: str, leaving: bool = False) -> None:
        super().__init__(f"policy {policy!r} belongs to the server at {address}")
        self.address = address
        self.leaving = leaving


class Deleted(Fenced):
    """The policy was deleted: its tombstone turns late writers away."""


class LogLost(StoreError):
    """Redis holds less of the policy than was acknowledged: it was flushed or rolled back.

    Attributes:
        last_version: the last version Redis still has; None when the policy's records are gone altogether.
    """

    def __init__(self, policy: str, *, last_version: int | None) -> None:
        held = "nothing" if last_version is None else f"the log only up to version {last_version}"
        super().__init__(f"policy {policy!r}: Redis holds {held}")
        self.last_version = last_version


class Damaged(StoreError):
    """What Redis holds of a policy is not what was written, or not all of it.

    Attributes:
        what: the entry, page or header.
        why: how it shows.
    """

    def __init__(self, policy: str, *, what: str, why: str = "its checksum is another") -> None:
        super().__init__(f"policy {policy!r}: {what} is damaged: {why}")
        self.what = what
        self.why = why


class TooNew(StoreError):
    """A newer release has stored the policy, in a format that this one cannot read.

    Attributes:
        found: number of that format.
        readable: the newest that can be read.
    """

    def __init__(self, policy: str, *, found: int, readable: int = FORMAT) -> None:
        super().__init__(
            f"policy {policy!r} is stored in format {found}, by a newer release; this server reads formats up to"
            f" {readable}"
        )
        self.found = found
        self.readable = readable


class SweepVoid(StoreError):
    """What the store holds has changed while pages were written: they cannot be trusted, and are written again."""


class NotFound(StoreError):
    """No policy of that name (or of that uid) is stored."""


class Interrupted(StoreError):
    """A page was being written twice at once; the write that reports this changed nothing and can be repeated."""


class InvalidStoreUrl(StoreError, ValueError):
    """A store URL that cannot be used; the message never repeats its password."""
