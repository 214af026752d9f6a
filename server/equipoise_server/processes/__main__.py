"""One of the processes: `python -m equipoise_server.processes`, started by the parent; a pipe tells it the rest."""

import ctypes
import os
import signal
import sys

from equipoise_server.part import Part

_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Serves until SIGTERM; returns the exit status."""
    if sys.platform == "linux":  # the pipe tells of the parent's end, too, but not one that hangs
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    line = b""
    while not line.endswith(b"\n"):  # not a byte more: the rest is for who serves
        if not (byte := os.read(sys.stdin.fileno(), 1)):
            return 1
        line += byte
    part, settings = Part.from_order(line)
    from equipoise_server.app import run  # torch takes seconds to load

    return run(settings, part=part)


if __name__ == "__main__":
    sys.exit(main())
