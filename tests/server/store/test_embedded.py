import asyncio
import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from equipoise_server.store import (
    DataDirectoryInUse,
    EmbeddedRedis,
    EmbeddedRedisFailed,
    LogEntry,
    RedisBinaryMissing,
    RedisStore,
    Unavailable,
)
from tests.server.store.conftest import entries, eventually, is_running, kill, logged, policy


@pytest.fixture
async def embedded(tmp_path: Path) -> AsyncIterator[EmbeddedRedis]:
    redis = EmbeddedRedis(tmp_path / "data dir")
    await redis.start()
    yield redis
    await redis.stop()


@contextlib.asynccontextmanager
async def store_of(redis: EmbeddedRedis) -> AsyncIterator[RedisStore]:
    store = RedisStore.connect(redis.url, command_timeout_s=5)
    yield store
    await store.close()


async def fill(redis: EmbeddedRedis, *, last: int) -> None:
    async with store_of(redis) as store:
        await store.create(policy())
        await store.append(await store.acquire("lm", address="a:1"), entries(1, last))


async def last_version(redis: EmbeddedRedis) -> int:
    async with store_of(redis) as store:
        assert [entry.version for entry in await logged(store)] == list(
            range(1, (await store.log_state("lm")).last_version + 1)
        )
        return (await store.log_state("lm")).last_version


async def test_only_this_user_can_reach_it_and_no_network(embedded: EmbeddedRedis) -> None:
    assert stat.S_IMODE(embedded.socket.stat().st_mode) == 0o700
    assert stat.S_IMODE(embedded.socket.parent.stat().st_mode) == 0o700
    client = Redis.from_url(embedded.url, protocol=2, decode_responses=True)
    wanted = {"port": "0", "save": "", "appendonly": "yes", "maxmemory-policy": "noeviction", "appendfsync": "no"}
    found = {name: (await client.config_get(name))[name] for name in wanted}
    await client.aclose()
    assert found == wanted


async def test_fsync_always(tmp_path: Path) -> None:
    redis = EmbeddedRedis(tmp_path, fsync="always")
    await redis.start()
    client = Redis.from_url(redis.url, protocol=2, decode_responses=True)
    assert await client.config_get("appendfsync") == {"appendfsync": "always"}
    await client.aclose()
    await redis.stop()


async def test_stopping_keeps_the_data_and_leaves_nothing_else(tmp_path: Path) -> None:
    redis = EmbeddedRedis(tmp_path)
    await redis.start()
    await fill(redis, last=5)
    pid, socket_dir = redis.pid, redis.socket.parent
    await redis.stop()
    await redis.stop()
    assert pid is not None
    assert not is_running(pid)
    assert not redis.alive
    assert not socket_dir.exists()
    again = EmbeddedRedis(tmp_path)
    await again.start()
    assert await last_version(again) == 5
    await again.stop()


async def test_a_killed_redis_is_started_again_with_everything_acknowledged(embedded: EmbeddedRedis) -> None:
    statuses: list[int] = []
    supervision = asyncio.create_task(embedded.supervise(on_exit=statuses.append))
    await fill(embedded, last=3)
    url, pid = embedded.url, embedded.pid
    assert pid is not None
    async with store_of(embedded) as store:
        owner = await store.acquire("lm", address="a:1")
        await store.append(owner, entries(4, 200))
        kill(pid)

        async def back() -> bool:
            with contextlib.suppress(Unavailable):
                await store.ping()
                return embedded.pid != pid
            return False

        await eventually(back)
        await store.append(owner, entries(201, 201))
    assert embedded.url == url
    assert statuses == [-signal.SIGKILL]
    assert await last_version(embedded) == 201
    await embedded.stop()
    await asyncio.wait_for(supervision, 60)


def cut_inside(data_dir: Path, content: bytes, *, whole_commands: bool) -> None:
    """Cuts Redis's file behind the command before the one with this content, or in its middle."""
    (file,) = [path for pattern in ("*.aof", "appendonlydir/*.incr.aof") for path in data_dir.glob(pattern)]
    written = file.read_bytes()
    inside = written.index(content)
    os.truncate(file, written.rindex(b"*", 0, inside) if whole_commands else inside + 2)


@pytest.mark.parametrize("whole_commands", [False, True])
async def test_a_transaction_that_was_half_written_is_never_applied(tmp_path: Path, whole_commands: bool) -> None:
    """Redis alone keeps its beginning and applies it two starts later, in place of what was acknowledged since."""

    async def append(first: int, last: int, *, content: bytes) -> None:
        redis = EmbeddedRedis(tmp_path)
        await redis.start()
        async with store_of(redis) as store:
            owner = await store.acquire("lm", address="a:1")
            versions = range(first, last + 1)
            await store.append(owner, [LogEntry(version=v, fields={"ids": content + b"%d" % v}) for v in versions])
        assert redis.pid is not None
        kill(redis.pid)
        await redis.stop()

    first = EmbeddedRedis(tmp_path)
    await first.start()
    async with store_of(first) as store:
        await store.create(policy())
    await first.stop()
    await append(1, 3, content=b"kept")
    await append(4, 9, content=b"torn")
    cut_inside(tmp_path, b"torn6", whole_commands=whole_commands)
    await append(4, 5, content=b"acknowledged")
    last = EmbeddedRedis(tmp_path)
    await last.start()
    async with store_of(last) as store:
        found = [entry.fields["ids"] for entry in await logged(store)]
    await last.stop()
    assert found == [b"kept1", b"kept2", b"kept3", b"acknowledged4", b"acknowledged5"]


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if "lost unless" in line]


@pytest.mark.parametrize("whole_commands", [False, True])
async def test_an_end_that_is_missing_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], whole_commands: bool
) -> None:
    redis = EmbeddedRedis(tmp_path)
    await redis.start()
    await fill(redis, last=1)
    async with store_of(redis) as store:
        owner = await store.acquire("lm", address="a:1")
        for version in range(2, 6):
            await store.append(owner, entries(version, version))
    await redis.stop()
    assert said(capsys) == []
    cut_inside(tmp_path, b".....4", whole_commands=whole_commands)
    again = EmbeddedRedis(tmp_path)
    await again.start()
    missing, *cut = said(capsys)
    assert "shorter than what had reached the disk" in missing
    assert ["'lm': '4'" in line for line in cut] == [not whole_commands]  # else the beginning of a transaction is left
    assert await last_version(again) == 3
    await again.stop()
    for _ in range(2):
        await again.start()
        await again.stop()
    assert said(capsys) == []


async def test_a_second_server_is_told_who_holds_the_directory(embedded: EmbeddedRedis, tmp_path: Path) -> None:
    second = EmbeddedRedis(tmp_path / "data dir", lock_timeout_s=0.2)
    with pytest.raises(DataDirectoryInUse) as caught:
        await second.start()
    for part in (str(tmp_path / "data dir"), f"process {os.getpid()}", f"Redis {embedded.pid}"):
        assert part in str(caught.value)
    assert embedded.alive
    await fill(embedded, last=1)


async def test_a_start_waits_for_the_last_user_of_the_directory(embedded: EmbeddedRedis, tmp_path: Path) -> None:
    await fill(embedded, last=2)
    second = EmbeddedRedis(tmp_path / "data dir", lock_timeout_s=60)
    starting = asyncio.create_task(second.start())
    await asyncio.sleep(0)
    await embedded.stop()
    await starting
    assert await last_version(second) == 2
    await second.stop()


SERVER = """
import asyncio, pathlib, sys
from equipoise_server.store import EmbeddedRedis, LogEntry, RedisStore, StoredPolicy

async def main():
    redis = EmbeddedRedis(pathlib.Path(sys.argv[1]))
    await redis.start()
    print(redis.pid, redis.socket, flush=True)
    store = RedisStore.connect(redis.url, command_timeout_s=5)
    await store.create(StoredPolicy(name="lm", uid="u1", create_time=0.0, spec="{}"))
    owner = await store.acquire("lm", address="a:1")
    version = 0
    while True:
        version += 1
        await store.append(owner, [LogEntry(version=version, fields={"ids": b"x" * 5000})])
        print(version, flush=True)

asyncio.run(main())
"""


async def test_redis_dies_with_a_killed_server_and_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    server = await asyncio.create_subprocess_exec(sys.executable, "-c", SERVER, str(tmp_path), stdout=subprocess.PIPE)
    assert server.stdout is not None
    pid, socket = (await server.stdout.readline()).decode().split()
    acknowledged = 0
    while acknowledged < 300:
        acknowledged = int(await server.stdout.readline())
    server.kill()
    rest = (await server.communicate())[0].split()
    acknowledged = int(rest[-1]) if rest else acknowledged
    again = EmbeddedRedis(tmp_path, lock_timeout_s=60)
    await again.start()
    assert not is_running(int(pid))
    assert await last_version(again) in (acknowledged, acknowledged + 1)
    assert not Path(socket).parent.exists()
    await again.stop()


async def test_a_broken_file_is_reported_with_the_words_of_redis(tmp_path: Path) -> None:
    (tmp_path / "appendonly.aof").write_bytes(b"this is no append-only file\r\n")
    # Redis 7 keeps its files in a folder of this name, and cannot make it here.
    (tmp_path / "appendonlydir").write_bytes(b"")
    redis = EmbeddedRedis(tmp_path)
    with pytest.raises(EmbeddedRedisFailed, match=r"(?i)append") as caught:
        await redis.start()
    assert str(tmp_path) in str(caught.value)
    assert not redis.alive
    again = EmbeddedRedis(tmp_path / "other", lock_timeout_s=0)
    await again.start()
    await again.stop()


async def test_a_missing_binary_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("equipoise_server.store.redis_binary.find_spec", lambda name: None)
    with pytest.raises(RedisBinaryMissing, match=r"pip install 'equipoise\[embedded\]'"):
        await EmbeddedRedis(tmp_path / "data").start()


async def test_a_redis_too_old_on_the_path_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "redis-server"
    old.write_text("#!/bin/sh\necho 'Redis server v=5.0.14 sha=0 malloc=libc bits=64'\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    redis = EmbeddedRedis(tmp_path / "data")
    await redis.start()
    await fill(redis, last=1)
    await redis.stop()


async def test_a_data_directory_that_was_open_to_others_is_closed(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o777)
    redis = EmbeddedRedis(tmp_path)
    await redis.start()
    await redis.stop()
    assert stat.S_IMODE(os.stat(tmp_path).st_mode) == 0o700


async def test_a_copy_of_the_directory_leaves_the_redis_of_the_original_where_it_is(
    embedded: EmbeddedRedis, tmp_path: Path
) -> None:
    """The copy names the original's socket, as that of somebody who may be gone."""
    await fill(embedded, last=3)
    shutil.copytree(tmp_path / "data dir", tmp_path / "copy")
    copy = EmbeddedRedis(tmp_path / "copy")
    await copy.start()
    try:
        assert await last_version(copy) == 3
        assert embedded.socket.exists()
        assert await last_version(embedded) == 3
    finally:
        await copy.stop()
    assert embedded.socket.exists()
