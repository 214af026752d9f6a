"""The command line in a process that ends with the one that started it: `python -m equipoise.bound ARGUMENT...`

Standard input is a pipe that the starting process holds open and never writes to. However that process ends, the
kernel closes the pipe, and this process takes it as SIGTERM. It works on every Unix, and unlike the kernel's signal at
a parent's death it does not depend on which thread started the process.
"""

import os
import signal
import sys
import threading

from equipoise.cli import main


def end_with_input(descriptor: int = 0) -> None:
    """Sends this process SIGTERM, in order to stop it, once the descriptor is at its end; returns at once."""

    def watch() -> None:
        while os.read(descriptor, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()


if __name__ == "__main__":
    end_with_input()
    sys.exit(main())
