"""A data directory that one Redis at a time may use."""

import asyncio
import contextlib
import fcntl
import json
import os
import stat
import time
from pathlib import Path
from typing import Any

import structlog

from equipoise_server.store.errors import StoreError

log = structlog.get_logger("equipoise.redis")

LOCK_FILE = "equipoise.lock"

_POLL_S = 0.05


class DataDirectoryInUse(StoreError):  # noqa: N818 - as the rest of the tree
    """Another server, or the Redis that a dead one left behind, still uses the directory."""

    def __init__(self, directory: Path, holder: dict[str, Any]) -> None:
        server, redis = holder.get("server_pid", "unknown"), holder.get("redis_pid", "not started")
        super().__init__(
            f"the data directory {directory} is in use by another server: process {server}, its Redis {redis}"
        )


class DataDirectory:
    """A directory with an advisory lock (`flock`) on a file in it.

    The lock belongs to the open file, and the Redis process inherits that: the directory is free only when the server
    *and* its Redis are gone. The file also says who holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    @property
    def fd(self) -> int:
        """The locked file, for a child process to inherit."""
        if self._fd is None:
            raise RuntimeError(f"{self.path} is not locked")
        return self._fd

    async def lock(self, *, timeout_s: float) -> None:
        """Create the directory if need be and lock it.

        Raises:
            DataDirectoryInUse: somebody else held it for `timeout_s` seconds.
            OSError: the directory cannot be created or written.
        """
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        _close_to_others(self.path)
        fd = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            deadline = time.monotonic() + timeout_s
            while not _try_lock(fd):
                if time.monotonic() >= deadline:
                    raise DataDirectoryInUse(self.path, _read(fd))
                await asyncio.sleep(_POLL_S)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd

    def holder(self) -> dict[str, Any]:
        """What the last holder wrote down; empty where nobody did, and in a copy: its holder may live, elsewhere."""
        found = _read(self.fd)
        return found if found.get("inode") == self._inode else {}

    def sign(self, **holder: Any) -> None:
        """Write down who holds the lock."""
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, json.dumps(holder | {"inode": self._inode}).encode(), 0)

    @property
    def _inode(self) -> int:
        return os.fstat(self.fd).st_ino

    def release(self) -> None:
        """Let go; the lock ends when the last process that inherited it has ended."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _close_to_others(path: Path) -> None:
    """A directory that was there before may be open to others; that of another owner, such as a volume, stays so."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if not mode & 0o077:
        return
    try:
        path.chmod(0o700)
    except PermissionError:
        log.warning("others can enter the data directory", path=str(path), mode=f"{mode:04o}")
    else:
        log.info("the data directory is closed to others now", path=str(path), mode_before=f"{mode:04o}")


def _try_lock(fd: int) -> bool:
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _read(fd: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(fd, 4096, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
