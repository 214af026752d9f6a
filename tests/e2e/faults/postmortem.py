"""What is to be known when something did not come about: of the server, and of the trainers that wait for it."""

import sys
import threading
from collections.abc import Iterator, Sequence

from tests.e2e.faults.gauges import gauges
from tests.e2e.faults.stacks import place
from tests.e2e.faults.trainers import Trainer
from tests.e2e.faults.zygote import ForkedServer

LOG_LINES = 30
METRICS = ("active_streams", "queue_depth", "inflight_bytes", "unpersisted_updates", "redis_up", "event_loop_tasks")
FRAMES = 6
TIMEOUT_S = 3.0
CLIENT_THREAD = "equipoise-stream"
"""What the clients call theirs."""


def postmortem(server: ForkedServer, trainers: Sequence[Trainer]) -> str:
    """All of it, as text. Whoever cannot tell is said not to."""
    log = server.log.splitlines()[-LOG_LINES:]  # before the stacks are written into it
    parts = {
        "trainers": [trainer.describe() for trainer in trainers],
        "threads here": [*threads({trainer.trainer_id for trainer in trainers} | {CLIENT_THREAD})],
        "metrics of the server": [metrics(server)],
        f"last {LOG_LINES} lines of the server's log": log,
        "stacks of the server": server.stacks().splitlines(),
    }
    return "\n".join(f"== {title}\n" + "\n".join(f"  {line}" for line in lines) for title, lines in parts.items())


def metrics(server: ForkedServer) -> str:
    """Some of the server's gauges."""
    try:
        found = gauges(server, timeout_s=TIMEOUT_S)
    except OSError as error:
        return f"not to be had: {error}"
    return ", ".join(f"{name} {found.get(name)}" for name in METRICS)


def threads(names: set[str]) -> Iterator[str]:
    """Where some threads of this process are, innermost call last."""
    frames = sys._current_frames()
    for thread in threading.enumerate():
        frame = frames.get(thread.ident or 0)
        if thread.name in names and frame is not None:
            places = []
            while frame is not None and len(places) < FRAMES:
                places.append(place(frame))
                frame = frame.f_back
            yield f"{thread.name}: {' > '.join(reversed(places))}"
