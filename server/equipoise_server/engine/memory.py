"""Whether a policy's tables fit the device: a server that runs out of memory loses every policy, not one."""

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


def check_room(spec: PolicySpec, device: torch.device) -> None:
    """Raises ServiceError (DEVICE_FULL) when a policy's tables do not fit what is free now."""
    needed = sum(column.numel() * column.element_size() for column in spec.outline().columns.values())
    free = free_bytes(device) if needed > ALWAYS_FITS else None
    if free is not None and needed > SHARE * free:
        raise device_full(spec.name, needed=needed, free=free, device=device.type)


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
