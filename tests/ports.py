"""Ports that nobody else gets, also while no process listens there: a server that was killed comes back to its own.

The system hands out higher ones to whoever asks for any port, and to every connection. Of these each worker of
pytest-xdist has a part, so that two tests that run at once do not choose the same.
"""

import os
import random
import socket
from collections import deque
from contextlib import suppress

FIRST, LAST = 10_000, 20_000
"""What is above may be taken by nodes of a Redis cluster, which talk to each other 10,000 ports above their own."""
WORKERS = 20
_EACH = (LAST - FIRST) // WORKERS
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % WORKERS
_next = random.randrange(_EACH)
HELD = 200
_held: deque[socket.socket] = deque()
"""Names that tell other runs of the tests on this machine which ports are in use here, the newest ones."""


def free_port() -> int:
    """A port of this machine that is free now, and that this process has not given out lately."""
    global _next
    for _ in range(_EACH):
        port = FIRST + _worker * _EACH + _next
        _next = (_next + 1) % _EACH
        name = socket.socket(socket.AF_UNIX)
        with suppress(OSError), socket.socket() as bare:
            bare.bind(("127.0.0.1", port))
            name.bind(f"\0equipoise-tests-{port}")
            _held.append(name)
            if len(_held) > HELD:
                _held.popleft().close()
            return port
        name.close()
    raise OSError(f"ports {FIRST} to {LAST}: all of worker {_worker} are taken")
