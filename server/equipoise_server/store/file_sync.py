"""Forces the file of the embedded Redis to disk, from outside it."""

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

Fsync: TypeAlias = Callable[[int], None]
"""Forces an open file to disk; raises OSError."""

_MARK = "equipoise.synced"
_STOP_TIMEOUT_S = 10.0  # of one fsync that hangs while we stop


class FileSync:
    """Syncs Redis's append-only files once a second, in a thread of its own.

    Redis's own `everysec` postpones its writes for up to two seconds while a sync is slow, and answers all the same:
    killed then, it has lost what it answered. With `appendfsync no` it writes before it answers, always, and what
    reaches the disk, and when, is left to this class. Files are found anew each time, since Redis replaces them when it
    rewrites its log: `appendonly.aof` up to version 6.2, a folder `appendonlydir` since 7.
    """

    def __init__(
        self,
        directory: Path,
        *,
        on_change: Callable[[OSError | None], None],
        interval_s: float = 1.0,
        fsync: Fsync = os.fsync,
    ) -> None:
        """Prepare; nothing happens before `start`.

        Args:
            directory: where Redis keeps its files.
            on_change: told of the first failure of several, and None once a sync succeeds again; on the thread.
            interval_s: seconds from the end of one sync to the next.
            fsync: what is called.
        """
        self._directory = directory
        self._on_change = on_change
        self._interval_s = interval_s
        self._fsync = fsync
        self._synced: dict[Path, tuple[int, int]] = {}  # inode and size, since a file only grows
        self._marked: dict[str, tuple[int, int]] = {}
        self._failing = False
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin; again after a `stop`, too."""
        self._stopping.clear()
        self._thread = threading.Thread(target=self._run, name="file-sync", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Sync a last time and end; blocks meanwhile, for 10 s at most. Can be called again."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(_STOP_TIMEOUT_S)
            self._thread = None

    def sync(self) -> None:
        """Sync what has changed since the last time. A failure is told, and the next call tries again."""
        error = None
        for path in self._files():
            try:
                self._sync_file(path)
            except FileNotFoundError:  # Redis has replaced it
                self._synced.pop(path, None)
            except OSError as failure:
                error = failure
        self._mark()
        if (error is not None) != self._failing:
            self._failing = error is not None
            self._on_change(error)

    def _run(self) -> None:
        while not self._stopping.wait(self._interval_s):
            self.sync()
        self.sync()

    def _mark(self) -> None:
        """Writes down how much is on disk, so that a start notices when less of it is there."""
        now = {str(path.relative_to(self._directory)): mark for path, mark in self._synced.items()}
        if now != self._marked:
            with contextlib.suppress(OSError):
                mark = self._directory / _MARK
                mark.touch(mode=0o600)
                mark.write_text(json.dumps(now))
                self._marked = now

    def _files(self) -> Iterator[Path]:
        yield self._directory / "appendonly.aof"
        yield from (self._directory / "appendonlydir").glob("*.aof")

    def _sync_file(self, path: Path) -> None:
        with path.open("rb") as file:
            facts = os.fstat(file.fileno())
            mark = facts.st_ino, facts.st_size
            if self._synced.get(path) == mark:
                return
            self._fsync(file.fileno())
        if self._synced.get(path, (0, 0))[0] != facts.st_ino:
            self._sync_name(path.parent)
        self._synced[path] = mark

    def _sync_name(self, directory: Path) -> None:
        """A new file is found after a loss of power only once its directory is on disk, too."""
        fd = os.open(directory, os.O_RDONLY)
        try:
            self._fsync(fd)
        finally:
            os.close(fd)


def missing_bytes(directory: Path) -> int:
    """How much less there is in Redis's files than had reached the disk when they were last synced; 0: nothing."""
    try:
        marked = json.loads((directory / _MARK).read_text())
        return sum(max(0, size - _size(directory / name, inode)) for name, (inode, size) in marked.items())
    except (OSError, ValueError, TypeError, AttributeError):  # none was written, or not all of it
        return 0


def forget_mark(directory: Path) -> None:
    """Redis has cut its file itself: what was marked holds no longer."""
    (directory / _MARK).unlink(missing_ok=True)


def _size(path: Path, inode: int) -> float:
    """Bytes of the same file; of one that was replaced since nothing is known."""
    try:
        facts = path.stat()
    except FileNotFoundError:
        return float("inf")
    return facts.st_size if facts.st_ino == inode else float("inf")
