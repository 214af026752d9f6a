"""What a Redis has answered while its disk was slow, after a SIGKILL."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

import pytest
import redis

from tests.server.store.conftest import running_redis

SEIZE, INTERRUPT = 0x4206, 0x4207
OF_ALL_KINDS = 0x40000000  # for waitpid: threads, too
SLOW_S = 2.0
"""A sync begins once a second."""
MAX_S = 60.0


def sync_threads(pid: int) -> list[int]:
    """The thread in which a Redis syncs its file, once it is there."""
    folders = Path(f"/proc/{pid}/task").iterdir()
    return [int(folder.name) for folder in folders if (folder / "comm").read_text().startswith("bio_aof")]


@contextmanager
def no_sync_ends(pid: int) -> Iterator[None]:
    """Stops the thread in which a Redis syncs its file, as a slow disk does; for good, since Redis is killed then."""
    end = monotonic() + MAX_S
    while not (named := sync_threads(pid)):  # it gives itself its name
        assert monotonic() < end
    (thread,) = named
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    if ptrace(SEIZE, thread, None, None):
        pytest.skip(f"threads of other processes cannot be stopped here: {os.strerror(ctypes.get_errno())}")
    assert ptrace(INTERRUPT, thread, None, None) == 0
    os.waitpid(thread, OF_ALL_KINDS)
    yield
    os.waitpid(thread, OF_ALL_KINDS)


@pytest.mark.skipif(sys.platform != "linux", reason="threads of other processes are stopped by ptrace")
@pytest.mark.parametrize(("appendfsync", "keeps"), [("no", True), ("everysec", False)])
def test_only_redis_own_everysec_loses_what_it_answered(short_dir: Path, appendfsync: str, *, keeps: bool) -> None:
    settings = ("--appendonly", "yes", "--appendfsync", appendfsync)

    def loses(attempt: int) -> bool:
        directory = short_dir / f"slow-{appendfsync}-{attempt}"
        directory.mkdir()
        with running_redis(directory, *settings) as process, no_sync_ends(process.process.pid):
            answered = fill(process.socket, for_s=SLOW_S if keeps else MAX_S)
            process.process.kill()
        with (
            running_redis(directory, *settings) as process,
            redis.Redis(unix_socket_path=str(process.socket)) as client,
        ):
            return bool(client.xlen("log") < answered)

    if keeps:
        assert not loses(0)
    else:  # Redis waits for the sync for two seconds, then writes: now and then just before it is killed
        assert any(loses(attempt) for attempt in range(5))


def fill(socket: Path, *, for_s: float) -> int:
    """Appends until an answered entry is not in the file, at most for so long."""
    answered, end = 0, monotonic() + for_s
    with redis.Redis(unix_socket_path=str(socket)) as client:
        while monotonic() < end:
            client.xadd("log", {"a": b"x" * 100})
            answered += 1
            if client.info("persistence")["aof_buffer_length"]:
                break
    return answered
