import errno
import os
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from redis.asyncio import Redis

from equipoise_server.store.file_sync import FileSync
from tests.server.store.conftest import eventually, running_redis


class Disk:
    """Notes what it is asked to sync, by inode, and refuses it while it is full."""

    def __init__(self) -> None:
        self.synced: list[int] = []
        self.full = False
        self.asked = threading.Event()

    def fsync(self, fd: int) -> None:
        self.asked.set()
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.synced.append(os.fstat(fd).st_ino)

    def take(self) -> list[int]:
        taken, self.synced = self.synced, []
        return taken


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def changes() -> list[OSError | None]:
    return []


@pytest.fixture
def sync(tmp_path: Path, disk: Disk, changes: list[OSError | None]) -> FileSync:
    return FileSync(tmp_path, on_change=changes.append, interval_s=0.01, fsync=disk.fsync)


def inode(path: Path) -> int:
    return path.stat().st_ino


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def test_a_file_is_synced_when_it_has_grown_and_its_name_when_it_is_new(
    tmp_path: Path, disk: Disk, sync: FileSync
) -> None:
    sync.sync()
    assert disk.take() == []
    file = tmp_path / "appendonly.aof"
    grow(file)
    sync.sync()
    assert disk.take() == [inode(file), inode(tmp_path)]
    sync.sync()
    assert disk.take() == []
    grow(file)
    sync.sync()
    assert disk.take() == [inode(file)]
    new = tmp_path / "temp-rewriteaof.aof"
    grow(new)
    grow(new)
    new.rename(file)  # of the same size as the one it replaces
    sync.sync()
    assert disk.take() == [inode(file), inode(tmp_path)]


def test_every_file_of_a_later_redis_is_synced(tmp_path: Path, disk: Disk, sync: FileSync) -> None:
    folder = tmp_path / "appendonlydir"
    folder.mkdir()
    first, base, second = (folder / f"appendonly.aof.{name}.aof" for name in ("1.incr", "2.base", "2.incr"))
    grow(first)
    sync.sync()
    assert disk.take() == [inode(first), inode(folder)]
    for file in (first, base, second):
        grow(file)
    sync.sync()
    assert set(disk.take()) == {inode(first), inode(base), inode(second), inode(folder)}
    first.unlink()
    grow(second)
    sync.sync()
    assert disk.take() == [inode(second)]


def test_a_full_disk_is_told_once_and_tried_again(
    tmp_path: Path, disk: Disk, sync: FileSync, changes: list[OSError | None]
) -> None:
    file = tmp_path / "appendonly.aof"
    grow(file)
    disk.full = True
    for _ in range(3):
        sync.sync()
    assert [error and error.errno for error in changes] == [errno.ENOSPC]
    disk.full = False
    sync.sync()
    assert changes[1:] == [None]
    assert disk.take() == [inode(file), inode(tmp_path)]


def test_its_thread_syncs_again_and_again_and_once_more_at_the_end(tmp_path: Path, disk: Disk, sync: FileSync) -> None:
    file = tmp_path / "appendonly.aof"
    for _ in range(2):
        sync.start()
        for _ in range(3):
            disk.asked.clear()
            grow(file)
            assert disk.asked.wait(20)
        sync.stop()
        sync.stop()
        disk.take()
    slow = FileSync(tmp_path, on_change=lambda error: None, interval_s=1000, fsync=disk.fsync)
    slow.start()
    slow.stop()
    assert inode(file) in disk.take()


async def test_it_follows_redis_through_a_rewrite_of_its_file(short_dir: Path, disk: Disk) -> None:
    directory = short_dir / "rewriting"
    directory.mkdir()
    sync = FileSync(directory, on_change=lambda error: None, fsync=disk.fsync)
    with running_redis(directory, "--appendonly", "yes", "--appendfsync", "no") as process:
        client = Redis.from_url(process.url, protocol=2)
        await client.set("key", "1")
        sync.sync()
        (live,) = open_for_writing(process.process.pid, directory)
        assert live in disk.take()
        await client.bgrewriteaof()

        async def rewritten() -> bool:
            return bool(open_for_writing(process.process.pid, directory) - {live})

        await eventually(rewritten)
        await client.set("key", "2")
        sync.sync()
        assert open_for_writing(process.process.pid, directory) - {live} <= set(disk.take())
        await client.aclose()


def open_for_writing(pid: int, directory: Path) -> set[int]:
    """Inodes of the append-only files that a process holds open under their final names."""
    names = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since
            names.add(link.readlink())
    return {inode(name) for name in names if name.is_relative_to(directory) and name.match("appendonly*.aof")}
