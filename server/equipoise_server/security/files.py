"""Files of secrets: noticing that they were replaced, and that others can read them; how often they were read again."""

import contextlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

Stamp: TypeAlias = tuple[tuple[int, int, int] | None, ...]
"""Inode, time of change in ns and size of each file; None for one that is not there."""


@dataclass(slots=True)
class Reloads:
    """How often files were read again because they had changed.

    Attributes:
        ok: what they held was taken over.
        failed: it could not be used; what was known before still holds.
    """

    ok: int = 0
    failed: int = 0


def stamp(paths: Iterable[Path | None]) -> Stamp:
    """What changes when one of the files does; links are followed, as Kubernetes swaps those."""
    return tuple(_one(path) for path in paths if path is not None)


def is_exposed(path: Path) -> bool:
    """Whether every user of this machine can read the file; a file that is not there is not."""
    with contextlib.suppress(OSError):
        return bool(os.stat(path).st_mode & stat.S_IROTH)
    return False


def _one(path: Path) -> tuple[int, int, int] | None:
    with contextlib.suppress(OSError):
        found = os.stat(path)
        return found.st_ino, found.st_mtime_ns, found.st_size
    return None
