"""What was appended to a Redis whose disk ran full, after a SIGKILL."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from equipoise_server.store import LogEntry, Ownership, RedisStore, StoredPolicy, Unavailable
from tests.server.store.conftest import running_redis

SETTINGS = ("--appendonly", "yes", "--appendfsync", "no", "--auto-aof-rewrite-percentage", "0")
POLICY = StoredPolicy(name="lm", uid="u1", create_time=1.0, spec="{}")


@pytest.fixture
def small_disk(short_dir: Path) -> Iterator[Path]:
    disk = short_dir / "small"
    disk.mkdir(exist_ok=True)
    if os.system(f"mount -t tmpfs -o size=2m none {disk} 2>/dev/null"):
        pytest.skip("a small file system cannot be mounted here")
    yield disk
    os.system(f"umount {disk}")


async def fill(store: RedisStore, owner: Ownership) -> int:
    """Appends until the store refuses; the last version that it took."""
    taken = 0

    async def append_for_ever() -> None:
        nonlocal taken
        while True:
            await store.append(owner, [LogEntry(version=taken + 1, fields={"c": os.urandom(977)})])
            taken += 1

    with pytest.raises(Unavailable) as caught:
        await append_for_ever()
    assert caught.value.kind == "misconf"
    return taken


@pytest.mark.parametrize("confirms", [True, False])
async def test_what_was_confirmed_survives_a_full_disk_and_a_kill(
    short_dir: Path, small_disk: Path, *, confirms: bool
) -> None:
    """Without the confirmation Redis takes an append whose write to the file fails."""
    data = small_disk / "data"
    data.mkdir()
    with running_redis(data, *SETTINGS) as process:
        store = RedisStore.connect(f"unix://{process.socket}", confirms_writes=confirms)
        await store.create(POLICY)
        taken = await fill(store, await store.acquire("lm", address="a"))
        process.process.kill()
        await store.close()
    room = short_dir / f"room-{confirms}"
    shutil.copytree(data, room, ignore=shutil.ignore_patterns("*.sock"))
    with running_redis(room, *SETTINGS) as process:
        store = RedisStore.connect(f"unix://{process.socket}")
        kept = (await store.log_state("lm")).last_version
        await store.close()
    assert taken > 1000
    assert (kept >= taken) is confirms
