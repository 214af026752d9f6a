"""The policy server of a command: the one that was named, or a local one for as long as the command runs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console

from equipoise.testing import ServerProcess, Setting, serve

PREFIX: Final = "EQUIPOISE_"
"""Of the settings of servers and clients in the environment."""


@contextmanager
def server_address(server: str | None, *, needed: bool, console: Console) -> Iterator[tuple[str, str]]:
    """Address of the policy server, and what it is in words; without one, a local server runs meanwhile.

    Args:
        server: `host:port`; None: a local one.
        needed: whether there is anything to ask it.
        console: where it is told.
    """
    if not needed:
        yield "", "none"
    elif server is not None:
        yield server, server
    else:
        console.print("No --server: starting a local one for this run …", highlight=False)
        with local_server() as local:
            console.print(f"Local policy server at {local.address}, with a Redis of its own.", highlight=False)
            yield local.address, "local, with its embedded Redis"


@contextmanager
def local_server(**settings: Setting) -> Iterator[ServerProcess]:
    """A local server with these settings and else the defaults, spoken to in plaintext: see `equipoise.testing.serve`.

    Meanwhile the environment's settings are hidden, from child processes too: they are about another server, whose
    Redis, certificate and token this one must not use and its clients must not expect.
    """
    hidden = {name: value for name, value in os.environ.items() if name.startswith(PREFIX)}
    for name in hidden:
        del os.environ[name]
    try:
        with serve(**settings) as local:
            yield local
    finally:
        os.environ.update(hidden)
