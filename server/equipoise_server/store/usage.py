"""What the embedded Redis takes: memory, disk, and how much of the disk is left."""

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from equipoise_server.store.append_only import AppendOnlyFiles


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a Redis takes at one moment, bytes.

    Attributes:
        memory_bytes: resident memory of its process; None: unknown, or there is no process now.
        file_bytes: of its append-only files.
        disk_free_bytes: what is left where they are.
    """

    memory_bytes: int | None
    file_bytes: int
    disk_free_bytes: int

    @classmethod
    def of(cls, directory: Path, pid: int | None) -> "Usage":
        """The usage of now, asked of the system alone: a Redis that hangs is no reason not to know. May block.

        Raises OSError for a directory that is not there.
        """
        return cls(
            memory_bytes=None if pid is None else _resident_bytes(pid),
            file_bytes=AppendOnlyFiles(directory).size,
            disk_free_bytes=shutil.disk_usage(directory).free,
        )


def _resident_bytes(pid: int) -> int | None:
    with suppress(OSError, ValueError, IndexError):
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return None
