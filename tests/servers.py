"""Servers as `equipoise.testing` starts them, in a tenth of a second each: forked from a process that has loaded torch.

What a test asks of a server that is started as users start it (its command line, its environment, that it ends with
its parent) it asks of `equipoise.testing`.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from tests.e2e.faults.zygote import ForkedServer as ServerProcess
from tests.e2e.faults.zygote import Zygote

__all__ = ["ServerProcess", "close", "serve", "zygote"]


@cache
def zygote() -> Zygote:
    """The process that this one's servers are forked from."""
    return Zygote()


def close() -> None:
    """Ends that process, if there is one; its servers must have ended before."""
    if zygote.cache_info().currsize:
        zygote().close()


@contextmanager
def serve(**settings: str | float | Path) -> Iterator[ServerProcess]:
    """Runs a server with a Redis of its own, and removes its files at the end; see `equipoise.testing.serve`.

    It is patient with a Redis of its own, which a busy machine may not run for a second; one that a test brings
    may be there to be stalled.
    """
    # A short path: the server's Redis listens on a socket in it, whose path is limited to about 100 bytes.
    directory = Path(tempfile.mkdtemp(prefix="equipoise-"))
    if "redis_url" not in settings:
        settings = {"redis_timeout_s": 30.0, **settings}
    server = ServerProcess(zygote(), directory, **settings)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(directory, ignore_errors=True)
