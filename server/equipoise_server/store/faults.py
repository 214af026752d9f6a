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
    (exceptions.AskError, "cluster"),
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

_SCRIPT = re.compile(r"(ERR )?Error running script \(call to f_\w+\): @user_script:\s?\d+: (@user_script: \d+: )?")

_PHRASES = (
    ("No connection available", "exhausted"),
    ("previous master is now a slave", "readonly"),
    ("invalid username-password pair", "auth"),
    ("No master found", "refused"),
    ("no Sentinel names", "refused"),
    ("refused", "refused"),
    ("can't run this command", "auth"),
    ("connecting to", "refused"),
    ("Timeout", "timeout"),
)

REDIS_FAULTS = (exceptions.RedisError, exceptions.RedisClusterException, OSError, TimeoutError)
"""What a call of the Redis client may raise."""


def kind_of(fault: BaseException) -> str:
    """The `Unavailable.kind` of an exception of the Redis client."""
    # The client wraps what it meets while it tries a connection into another error: the first cause is told.
    if _forbidden(fault):
        return "auth"
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


def _forbidden(fault: BaseException | None) -> exceptions.NoPermissionError | None:
    """A missing permission: the client says of a cluster that it is none when it may not ask for its slots."""
    while fault is not None and not isinstance(fault, exceptions.NoPermissionError):
        fault = fault.__cause__ or fault.__context__
    return fault


def was_unsent(fault: BaseException) -> bool:
    """Whether a command has not left: its connection had been reset before."""
    return isinstance(fault, exceptions.ConnectionError) and "while writing" in str(fault)


def as_unavailable(fault: Exception, *, command: str) -> Unavailable:
    """The store's own error for an exception of the Redis client."""
    kind = kind_of(fault)
    return Unavailable(f"Redis, {command}: {kind}: {_told(fault)}", kind=kind)


def _told(fault: BaseException) -> str:
    if isinstance(fault, exceptions.AskError):
        return "it is a node of a cluster, whose URL begins with redis+cluster://"
    if forbidden := _forbidden(fault):
        fault = forbidden
    # Redis names its script and the line, which only its authors know.
    return _SCRIPT.sub("", str(fault)) or ("no answer in time" if isinstance(fault, TimeoutError) else "")
