"""The private folder of a server of several processes: sockets and ready files, gone when the server is."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

PREFIX = "equipoise-processes-"
LONGEST = 90
"""Bytes; of the path of a socket in it, systems allow 104 to 108."""


class PrivateDirectory:
    """A new folder that only this user can enter, locked as long as this process lives.

    It is made where temporary files are; in a container that has no disk to write to, in its shared memory. Those that
    killed servers of this user have left there are removed: nobody locks them.

    Raises:
        OSError: there is no place for it.
    """

    def __init__(self) -> None:
        self.path, self._lock = _made()
        _remove_abandoned(Path(self.path).parent)

    def remove(self) -> None:
        """Removes it with all that is in it; can be called again."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1


def _made() -> tuple[str, int]:
    for place in (None, "/tmp"):
        with contextlib.suppress(OSError):
            path, lock = _made_in(place)
            if len(os.fsencode(path)) <= LONGEST:
                return path, lock
            os.rmdir(path)
            os.close(lock)
    return _made_in("/dev/shm")


def _made_in(place: str | None) -> tuple[str, int]:
    while True:
        path = tempfile.mkdtemp(prefix=PREFIX, dir=place)
        if (lock := _locked(path)) is not None:
            return path, lock
        # Else another server that starts has taken it for one that was left, and removes it.


def _locked(path: str) -> int | None:
    """A descriptor that locks the folder; None: another one has it, or it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):  # not removed meanwhile
            return descriptor
    os.close(descriptor)
    return None


def _remove_abandoned(place: Path) -> None:
    for path in place.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if path.lstat().st_uid == os.getuid() and (lock := _locked(str(path))) is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)
