"""What a server says in its log."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from equipoise.testing import ServerProcess


@dataclass(frozen=True, slots=True)
class Ended:
    """Work that a server has told the end of.

    Attributes:
        at: time, seconds since 1970.
        seconds: that it took.
        pages: of the policy's tables that it read or wrote.
        entries: of the log that it replayed.
    """

    at: float
    seconds: float
    pages: int
    entries: int


def told(server: ServerProcess, event: str) -> Iterator[Ended]:
    """All ends of `loaded` or `swept`, of a server whose `log_format` is json."""
    for line in server.log.splitlines():
        if f'"{event}"' in line and (said := json.loads(line)).get("event") == event:
            at = datetime.fromisoformat(said["timestamp"]).timestamp()
            yield Ended(at, float(said["seconds"]), int(said["pages"]), int(said.get("entries", 0)))
