"""The policy server of a command: the one that was named, or a local one for as long as the command runs."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from equipoise.testing import serve


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
        with serve() as local:
            console.print(f"Local policy server at {local.address}, with a Redis of its own.", highlight=False)
            yield local.address, "local, with its embedded Redis"
