"""What fits: a server that runs out of memory loses every policy, not one."""

import ctypes
from collections.abc import Hashable
from contextlib import suppress
from pathlib import Path

import torch

from equipoise_server.engine.spec import PolicySpec
from equipoise_server.errors import device_full

SHARE = 0.9
"""How much of what is free the tables of one policy may take; steps and sweeps need some, too."""

ALWAYS_FITS = 16 << 20
"""Bytes of tables that are never refused: estimates of what is free are not that exact."""

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's <malloc.h>
LARGE_BLOCK_BYTES = 4 << 20


def tune_allocator() -> None:
    """Makes glibc give large blocks back to the system when they are freed; elsewhere nothing is done.

    Left to itself it keeps what has been as large as the largest message, in pieces, for as long as the process lives.
    """
    with suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, LARGE_BLOCK_BYTES)


def give_back_freed() -> None:
    """Gives the system what is free between blocks that are in use, in all threads' heaps: some milliseconds."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def check_room(spec: PolicySpec, device: torch.device) -> None:
    """Raises ServiceError (DEVICE_FULL) when a policy's tables do not fit what is free now."""
    needed = spec.table_bytes
    free = free_bytes(device) if needed > ALWAYS_FITS else None
    if free is not None and not has_room(needed, free=free):
        raise device_full(spec.name, needed=needed, free=free, device=device.type)


def has_room(needed: int, *, free: int | None) -> bool:
    """Whether tables of `needed` bytes fit a device of which `free` are free; None: nobody knows, and they may."""
    return free is None or needed <= max(ALWAYS_FITS, SHARE * free)


def free_bytes(device: torch.device, *, meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int | None:
    """Free bytes of a device, of the machine's or the container's memory for the CPU; None: nobody knows."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    known = [number for number in (_available(meminfo), _left(cgroup)) if number is not None]
    return min(known, default=None)


def _available(meminfo: Path) -> int | None:
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _left(cgroup: Path) -> int | None:
    """What a container may still take; files that are only cached for it can be let go."""
    try:
        most = (cgroup / "memory.max").read_text(encoding="ascii").strip()
        used = int((cgroup / "memory.current").read_text(encoding="ascii"))
        lines = (cgroup / "memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    cached = sum(int(line.split()[1]) for line in lines if line.startswith(("inactive_file ", "active_file ")))
    return None if most == "max" else max(0, int(most) - used + cached)


class Backlogs:
    """The memory for what policies keep of their logs, all of them together.

    While it is used up each policy may keep an equal part: who keeps more lets go, and nobody else has to.

    Args:
        max_bytes: of all together; what policies that rest keep when it comes to that stays.
        max_policy_bytes: of one policy, always.
    """

    def __init__(self, *, max_bytes: int, max_policy_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._max_policy_bytes = max_policy_bytes
        self._kept: dict[Hashable, int] = {}
        self._total = 0

    @property
    def total(self) -> int:
        """Bytes that are kept now."""
        return self._total

    @property
    def max_bytes(self) -> int:
        """Most bytes of all together."""
        return self._max_bytes

    @property
    def limit(self) -> int:
        """Bytes that one policy may keep now."""
        if self._total <= self._max_bytes:
            return self._max_policy_bytes
        return min(self._max_policy_bytes, self._max_bytes // len(self._kept))

    def note(self, policy: Hashable, num_bytes: int) -> None:
        """A policy keeps so much now; 0: it keeps nothing, or has gone."""
        self._total += num_bytes - self._kept.pop(policy, 0)
        if num_bytes:
            self._kept[policy] = num_bytes
