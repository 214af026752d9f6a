"""Noticing that files were replaced."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

Stamp: TypeAlias = tuple[tuple[int, int, int] | None, ...]
"""Inode, time of change in ns and size of each file; None for one that is not there."""


def stamp(paths: Iterable[Path | None]) -> Stamp:
    """What changes when one of the files does; links are followed, as Kubernetes swaps those."""
    return tuple(_one(path) for path in paths if path is not None)


def _one(path: Path) -> tuple[int, int, int] | None:
    with contextlib.suppress(OSError):
        found = os.stat(path)
        return found.st_ino, found.st_mtime_ns, found.st_size
    return None
