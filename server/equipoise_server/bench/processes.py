"""What a process has used so far, as Linux tells it."""

import os
import time
from pathlib import Path


def cpu_seconds(pid: int) -> float:
    """Processor time of all threads of a process, ended ones too. Raises OSError when it has ended."""
    return time.clock_gettime((~pid << 3) | 2)  # clock_getcpuclockid(3): /proc counts hundredths of a second


def resident_bytes(pid: int) -> int:
    """Memory of a process that is in RAM. Raises OSError when it has ended."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def children(pid: int) -> list[int]:
    """Processes that a process has started and that run."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sorted(int(child) for thread in threads for child in (thread / "children").read_text().split())
