"""Run a program that ends when its parent does: `python parent_bound.py PARENT_PID PROGRAM ARGUMENT...`

On Linux the kernel sends the program SIGTERM when the thread that started it ends, however it ended. Redis takes that
as an orderly shutdown. Elsewhere the program outlives a killed parent; the lock on its data directory tells.
The thread, not the process: start this from the main thread. Imports little, since it runs before every Redis.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Bind this process to its parent, then become the program."""
    parent, program = int(arguments[0]), arguments[1]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the parent ended before its child began")
    os.execv(program, arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
