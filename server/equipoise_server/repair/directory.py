"""Repairs a data directory: in a copy of Redis's files, which take the place of the old ones when all is well."""

import asyncio
import os
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from equipoise_server.store import EmbeddedRedis, EmbeddedRedisFailed, StoreError
from equipoise_server.store.append_only import AppendOnlyFiles, steps_in
from equipoise_server.store.data_directory import DataDirectory
from equipoise_server.store.embedded import LOG_FILE

BACKUP = "backup-{:%Y%m%dT%H%M%SZ}"
_WORK_PREFIX = "repair-"
_UNKNOWN = re.compile(rb"Unknown command '(.+?)' reading the append only file", re.DOTALL)
_MOST_CUTS = 10_000


class NotRepairable(StoreError):  # noqa: N818 - as the rest of the tree
    """Nothing can be saved here; the message says what is left to do."""


@dataclass(slots=True)
class FileDamage:
    """What was cut off Redis's files.

    Attributes:
        cuts: one sentence each.
        bytes: how much in all.
        steps: first and last version of the steps that were in it, by policy.
    """

    cuts: list[str] = field(default_factory=list)
    bytes: int = 0
    steps: dict[str, tuple[int, int]] = field(default_factory=dict)


class DirectoryRepair:
    """A data directory under repair: nobody else can use it meanwhile.

    Attributes:
        damage: of the files themselves.
        url: of a Redis that runs on the repaired copy.
    """

    def __init__(self, path: Path, *, work: Path, redis: EmbeddedRedis, damage: FileDamage) -> None:
        self.damage = damage
        self.url = redis.url
        self._path = path
        self._work = work
        self._redis = redis

    async def replace(self, *, now: datetime) -> Path:
        """Puts the repaired files into the place of the old ones, which go to a folder of their own; which one."""
        await self._redis.stop()
        return await asyncio.to_thread(self._replace, self._path / BACKUP.format(now))

    def _replace(self, backup: Path) -> Path:
        old, new = AppendOnlyFiles(self._path), AppendOnlyFiles(self._work)
        backup.mkdir(mode=0o700)
        for name in old.all:
            (backup / name).parent.mkdir(mode=0o700, exist_ok=True)
            _link(self._path / name, backup / name)
        _sync(backup)
        # A crash in between must leave something that Redis loads as the old or as the new state, or refuses: names
        # that are new come first, the manifest, which tells what is loaded, before what it has told of all along.
        before, names = set(old.all), new.all
        for name in sorted(names, key=lambda name: (name in before, not name.name.endswith("manifest"))):
            (self._path / name).parent.mkdir(mode=0o700, exist_ok=True)
            (self._work / name).replace(self._path / name)
            _sync((self._path / name).parent)
        for name in before - old.loaded:
            (self._path / name).unlink(missing_ok=True)
        return backup


@asynccontextmanager
async def repaired(path: Path, *, told: Callable[[str], None] = lambda text: None) -> AsyncIterator[DirectoryRepair]:
    """Copies a directory's files, makes them loadable, and runs a Redis on the copy; the directory stays as it is.

    Args:
        path: of the directory.
        told: hears what is being done.

    Raises:
        DataDirectoryInUse: a server, or its Redis, uses it.
        NotRepairable: no Redis can load any of it.
        OSError: there is no room for the copy.
    """
    if not AppendOnlyFiles(path).paths:
        raise NotRepairable(f"{path}: there is no append-only file of Redis; nothing was ever kept here")
    directory = DataDirectory(path)
    await directory.lock(timeout_s=1.0)
    try:
        holder = directory.holder()
        directory.sign(**holder | {"server_pid": f"{os.getpid()} (equipoise repair)"})
        with tempfile.TemporaryDirectory(prefix=_WORK_PREFIX, dir=path) as folder:
            work = Path(folder)
            told(f"copying {AppendOnlyFiles(path).size:,} bytes")
            await asyncio.to_thread(_copy, path, work)
            told("checking them")
            redis, damage = await _load(work)
            try:
                yield DirectoryRepair(path, work=work, redis=redis, damage=damage)
            finally:
                await redis.stop()
        directory.sign(**holder)
    finally:
        directory.release()


async def _load(work: Path) -> tuple[EmbeddedRedis, FileDamage]:
    """A Redis that has loaded all that can be loaded."""
    files, damage = AppendOnlyFiles(work), FileDamage()
    for _ in range(_MOST_CUTS):
        await asyncio.to_thread(_cut_damage, files, damage)
        redis = EmbeddedRedis(work)
        try:
            await redis.start()
        except EmbeddedRedisFailed as error:
            # What is framed well may still be no command: Redis says which.
            if not await asyncio.to_thread(_cut_unknown, files, damage, (work / LOG_FILE).read_bytes()):
                raise NotRepairable(f"{error}; take the files of a backup") from error
            (work / LOG_FILE).unlink()
        else:
            return redis, damage
    raise NotRepairable(f"more than {_MOST_CUTS} pieces of the files are damaged; take those of a backup")


def _cut_damage(files: AppendOnlyFiles, damage: FileDamage) -> None:
    try:
        while (cut := files.damage()) is not None:
            if not cut.at:
                raise NotRepairable(f"{cut.path.name}: it is damaged from its first byte on; take the file of a backup")
            _note(damage, f"{cut.path.name}: byte {cut.at:,} of {cut.size:,}", files.apply(cut))
    except ValueError as error:
        raise NotRepairable(f"{error}; take the files of a backup") from error


def _cut_unknown(files: AppendOnlyFiles, damage: FileDamage, log: bytes) -> bool:
    found = _UNKNOWN.findall(log)
    cut = files.place_of(found[-1]) if found else None
    if cut is None or not cut.at:
        return False
    _note(damage, f"{cut.path.name}: byte {cut.at:,} of {cut.size:,} begins what is no command", files.apply(cut))
    return True


def _note(damage: FileDamage, cut: str, content: bytes) -> None:
    damage.cuts.append(cut)
    damage.bytes += len(content)
    _merge(damage.steps, steps_in(content))


def _merge(steps: dict[str, tuple[int, int]], more: Mapping[str, tuple[int, int]]) -> None:
    for policy, (first, last) in more.items():
        known = steps.get(policy, (first, last))
        steps[policy] = min(first, known[0]), max(last, known[1])


def _copy(source: Path, target: Path) -> None:
    files = AppendOnlyFiles(source)
    free = shutil.disk_usage(target).free
    if free < files.size:
        raise OSError(f"{source}: a copy needs {files.size:,} bytes, and {free:,} are free on its disk")
    for name in files.all:
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copy2(source / name, target / name)


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # not every file system can
        shutil.copy2(source, target)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
