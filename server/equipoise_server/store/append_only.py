"""The append-only file of the embedded Redis from outside: how much of it is whole, and what a lost part held.

One file up to Redis 6.2; since Redis 7 a folder of them, named by a manifest in the order in which they are loaded.
Redis itself is the judge of what it can load: its program, called `redis-check-aof`, is that tool.
"""

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from equipoise_server.store.redis_binary import find_redis_server

FOLDER = "appendonlydir"
_SINGLE, _MANIFEST = "appendonly.aof", f"{FOLDER}/appendonly.aof.manifest"
_LISTED = re.compile(r"^file (\S+) seq \d+ type ([bhi])", re.MULTILINE)
_WHOLE = re.compile(rb"ok_up_to=(\d+)")
_IN_TRANSACTION = b"before reading EXEC"
_CHECK_TIMEOUT_S = 3600.0

TAIL_BYTES = 32 << 20
"""How much of a file's end is looked at for what a start of Redis cuts off: more than its longest transaction."""

_STEP = re.compile(
    rb"XADD\r\n\$\d+\r\n[^\r\n{}]*:\{([a-z0-9._-]{1,128})\}:[^\r\n]*:log\r\n\$\d+\r\n(\d+)-\d+\r\n(?!\$0\r\n\r\n)"
)


@dataclass(frozen=True, slots=True)
class Cut:
    """What is not whole at the end of a file.

    Attributes:
        path: of the file.
        at: bytes that are whole.
        size: bytes that are there.
    """

    path: Path
    at: int
    size: int


class AppendOnlyFiles:
    """The append-only files in a directory of Redis."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @property
    def paths(self) -> list[Path]:
        """Those that Redis loads, in this order; empty: none yet."""
        manifest = self._directory / _MANIFEST
        if manifest.exists():
            listed = _LISTED.findall(manifest.read_text(errors="replace"))
            return [manifest.with_name(name) for name, kind in listed if kind != "h"]
        single = self._directory / _SINGLE
        return [single] if single.exists() else []

    @property
    def all(self) -> list[Path]:
        """Everything that belongs to them, the manifest too, relative to the directory."""
        found = [self._directory / _SINGLE, *sorted((self._directory / FOLDER).glob("*"))]
        return [path.relative_to(self._directory) for path in found if path.is_file()]

    @property
    def loaded(self) -> set[Path]:
        """Those that Redis loads, and the manifest, relative to the directory."""
        manifest = self._directory / _MANIFEST
        return {path.relative_to(self._directory) for path in (*self.paths, *([manifest] if manifest.exists() else ()))}

    @property
    def size(self) -> int:
        """Bytes of all of them."""
        return sum((self._directory / path).stat().st_size for path in self.all)

    def tail(self) -> bytes:
        """The end of the last one."""
        if not (paths := self.paths) or not paths[-1].exists():
            return b""
        with paths[-1].open("rb") as file:
            file.seek(max(0, paths[-1].stat().st_size - TAIL_BYTES))
            return file.read()

    def damage(self) -> Cut | None:
        """Where the first file that is not whole stops to be so; None: all are.

        Raises ValueError when nothing of a file can be read: one that is missing, or a snapshot at its beginning.
        """
        for path in self.paths:
            if not path.exists():
                raise ValueError(f"{path.name} is missing")
            size = path.stat().st_size
            if size and (whole := _whole_bytes(path)) < size:
                return Cut(path, whole, size)
        return None

    def place_of(self, command: bytes) -> Cut | None:
        """Where a command stands for the first time, or the transaction it is in: one that Redis does not know."""
        pattern = re.compile(rb"\*\d+\r\n\$%d\r\n%s\r\n" % (len(command), re.escape(command)))
        for path in self.paths:
            content = path.read_bytes()
            for found in pattern.finditer(content):
                if (at := _boundary(path, content, found.start())) is not None:
                    return Cut(path, at, len(content))
        return None

    def apply(self, cut: Cut) -> bytes:
        """Cuts a file, and leaves out those behind it; what was there."""
        content = cut.path.read_bytes()[cut.at :]
        with cut.path.open("r+b") as file:
            file.truncate(cut.at)
        paths = self.paths
        for path in paths[paths.index(cut.path) + 1 :]:
            content += path.read_bytes()
            self._leave_out(path)
        return content

    def _leave_out(self, path: Path) -> None:
        manifest = self._directory / _MANIFEST
        lines = manifest.read_text().splitlines(keepends=True)
        manifest.write_text("".join(line for line in lines if f"file {path.name} " not in line))
        path.unlink()


def steps_in(content: bytes) -> Mapping[str, tuple[int, int]]:
    """First and last version of the steps that a piece of a file appends, as far as it can be read, by policy."""
    found: dict[str, tuple[int, int]] = {}
    for match in _STEP.finditer(content):
        policy, version = match[1].decode(), int(match[2])
        first, last = found.get(policy, (version, version))
        found[policy] = min(first, version), max(last, version)
    return found


def told_steps(steps: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """The same for people: `17` or `17 to 20`, by policy."""
    return {
        policy: str(first) if first == last else f"{first} to {last}" for policy, (first, last) in sorted(steps.items())
    }


def _whole_bytes(path: Path) -> int:
    """How many bytes Redis would load."""
    is_snapshot = path.suffix == ".rdb"
    output, status = _ask("redis-check-rdb" if is_snapshot else "redis-check-aof", path)
    if status == 0:
        return path.stat().st_size
    if (match := _WHOLE.search(output)) is None:
        raise ValueError(f"the snapshot that {path.name} begins with is damaged")
    return int(match[1])


def _boundary(path: Path, content: bytes, at: int) -> int | None:
    """`at`, or where the transaction around it begins; None: it is in the middle of a command."""
    piece = path.with_name(f"{path.name}.piece")
    piece.write_bytes(content[:at])
    try:
        if not at:
            return 0
        output, status = _ask("redis-check-aof", piece)
    finally:
        piece.unlink()
    if status == 0:
        return at
    match = _WHOLE.search(output)
    return int(match[1]) if match and _IN_TRANSACTION in output else None


def _ask(tool: str, path: Path) -> tuple[bytes, int]:
    done = subprocess.run(
        [tool, str(path)],
        executable=find_redis_server(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=_CHECK_TIMEOUT_S,
        check=False,
    )
    return done.stdout, done.returncode
