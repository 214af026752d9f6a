"""Redis's many exceptions, told apart once."""

import re
from collections.abc import Iterator

from redis import exceptions

from equipoise_server.store.errors import Unavailable

_BY_CLASS: tuple[tuple[type[Exception], str], ...] = (
    (exceptions.BusyLoadingError, "loading"),
    (exceptions.AuthenticationError, "auth"),
    (exceptions.AuthenticationWrongNumberOfArgsError, "auth"),
    (exceptions.NoPermissionError, "auth"),
    (exceptions.OutOfMemoryError, "oom"),
    (exceptions.ReadOnlyError, "readonly"),
    (exceptions.MaxConnectionsError, "exhausted"),
    (exceptions.ClusterError, "cluster"),
    (exceptions.RedisClusterException, "cluster"),
    (exceptions.TimeoutError, "timeout"),
    (TimeoutError, "timeout"),
)

# Redis before 7 wraps an error inside a script into "ERR Error running script ...: -OOM ...": only the word is left.
_BY_WORD = {
    "OOM": "oom",
    "READONLY": "readonly",
    "MISCONF": "misconf",
    "LOADING": "loading",
    "BUSY": "busy",
    "NOAUTH": "auth",
    "WRONGPASS": "auth",
    "NOPERM": "auth",
    "CLUSTERDOWN": "cluster",
    "CROSSSLOT": "cluster",
    "MOVED": "cluster",
    "TRYAGAIN": "cluster",
    "MASTERDOWN": "cluster",
    "NOREPLICAS": "replicas",
}
_WORD = re.compile(rf"(?:^|[\s\-:])({'|'.join(_BY_WORD)})\b")

_PHRASES = (
    ("No connection available", "exhausted"),
    ("previous master is now a slave", "readonly"),
    ("No master found", "refused"),
    ("refused", "refused"),
    ("connecting to", "refused"),
    ("Timeout", "timeout"),
)

REDIS_FAULTS = (exceptions.RedisError, exceptions.RedisClusterException, OSError, TimeoutError)
"""What a call of the Redis client may raise."""


def kind_of(fault: BaseException) -> str:
    """The `Unavailable.kind` of an exception of the Redis client."""
    # The client wraps what it meets while it tries a connection into another error: the first cause is told.
    for each in _causes(fault):
        for fault_class, kind in _BY_CLASS:
            if isinstance(each, fault_class):
                return kind
    text = str(fault)
    if word := _WORD.search(text):
        return _BY_WORD[word.group(1)]
    for phrase, kind in _PHRASES:
        if phrase in text:
            return kind
    if isinstance(fault, ConnectionRefusedError | FileNotFoundError):
        return "refused"
    return "disconnected" if isinstance(fault, exceptions.ConnectionError | OSError) else "other"


def _causes(fault: BaseException | None) -> Iterator[BaseException]:
    while fault is not None:
        yield fault
        fault = fault.__cause__


def as_unavailable(fault: Exception, *, command: str) -> Unavailable:
    """The store's own error for an exception of the Redis client."""
    kind = kind_of(fault)
    return Unavailable(f"Redis, {command}: {kind}: {fault}", kind=kind)
