"""What a process is doing, told on a signal: for a server that does not answer and does not say why.

SIGUSR2 is answered whatever the process does, with the stacks of its threads; SIGUSR1 once its event loop turns, with
what each task waits for.
"""

import asyncio
import faulthandler
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

END = "-- end of tasks --"


def tell_on_signals() -> None:
    """Installs both in this process, which writes to standard error."""
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    signal.signal(signal.SIGUSR1, lambda *_: print(tasks(), END, sep="\n", file=sys.stderr, flush=True))


def tasks() -> str:
    """Where the tasks of the loop that runs here wait, outermost call first; equal ones once, with their number."""
    try:
        found = Counter(" > ".join(places(task.get_coro())) for task in asyncio.all_tasks())
    except RuntimeError:
        return "no event loop runs"
    return "\n".join(f"{count} x {place}" for place, count in found.most_common())


def places(waiting: Any) -> Iterator[str]:
    """Where a coroutine waits, and what it waits for, down to what is no coroutine."""
    while waiting is not None:
        kind = next((kind for kind in ("cr", "gi", "ag") if hasattr(waiting, f"{kind}_frame")), None)
        if kind is None:
            return
        frame = getattr(waiting, f"{kind}_frame")
        if frame is not None:
            yield place(frame)
        waiting = getattr(waiting, {"cr": "cr_await", "gi": "gi_yieldfrom", "ag": "ag_await"}[kind], None)


def place(frame: Any) -> str:
    """File, line and function of a frame."""
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
