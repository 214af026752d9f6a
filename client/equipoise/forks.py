"""Forked processes, such as the workers of a DataLoader, beside gRPC.

gRPC has handlers that run at a fork. Once a process holds a connection they end some of its children with a
segmentation fault, and hang others, also those that never use gRPC. The environment can turn them off, but gRPC reads
it only when it is imported. So this module, which `import equipoise` runs first, sets the variable where gRPC is not
imported yet; where it is, the first fork beside a connection is logged with the way out.

Without the handlers a child is safe as long as it leaves gRPC alone: the threads that gRPC needs stay in the parent. A
program whose children need gRPC, of whatever library, sets the variable itself.
"""

import logging
import os
import sys

logger = logging.getLogger("equipoise")

VARIABLE = "GRPC_ENABLE_FORK_SUPPORT"
"""Name in the environment of what turns the handlers on or off."""

_OFF = ("0", "f", "false", "n", "no")

ADVICE = (
    "this process is connected to a server, and is being forked while gRPC's fork handlers are on: the new process may"
    " crash or hang, be it only a worker of a DataLoader. Put `import equipoise` before the import that brings gRPC,"
    f" best first in the script, and leave the variable {VARIABLE} unset or 0"
)
"""What is logged at a fork that may go wrong."""

_connected_process: int | None = None
"""Process that opened the first connection: this one, or one that it was forked from."""


def _handlers_run() -> bool:
    """Turns the handlers off where that is still possible; whether they may run all the same."""
    if "grpc" not in sys.modules:
        os.environ.setdefault(VARIABLE, "0")
    return os.environ.get(VARIABLE, "").lower() not in _OFF


handlers_run = _handlers_run()
"""Whether gRPC's handlers may run at a fork."""


def note_connection() -> None:
    """This process is about to open a connection."""
    global _connected_process
    if _connected_process is None:
        _connected_process = os.getpid()
        if handlers_run:
            os.register_at_fork(before=_warn)


def cut_off() -> bool:
    """Whether this process was forked from one that was connected: gRPC does not work in it."""
    return _connected_process not in (None, os.getpid())


def _warn() -> None:
    global handlers_run
    if handlers_run:  # once
        handlers_run = False
        logger.warning(ADVICE)
