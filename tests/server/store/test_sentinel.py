from pathlib import Path

from equipoise_server.store import RedisStore
from tests.ports import free_port
from tests.server.store.conftest import entries, logged, policy, running_redis


async def test_the_store_finds_its_master_through_sentinel(short_dir: Path) -> None:
    master_dir, guard_dir = short_dir / "master", short_dir / "sentinel"
    master_dir.mkdir()
    guard_dir.mkdir()
    master_port, guard_port = free_port(), free_port()
    config = guard_dir / "sentinel.conf"
    config.write_text(f"sentinel monitor main 127.0.0.1 {master_port} 1\n")
    loopback = ("--bind", "127.0.0.1")
    with (
        running_redis(master_dir, "--port", str(master_port), *loopback),
        running_redis(guard_dir, "--port", str(guard_port), *loopback, "--sentinel", config=config),
    ):
        url = f"redis+sentinel://127.0.0.1:1,127.0.0.1:{guard_port}/main/1"
        store = RedisStore.connect(url, command_timeout_s=5)
        await store.create(policy())
        await store.append(await store.acquire("lm", address="a:1"), entries(1, 3))
        assert await logged(store) == entries(1, 3)
        await store.close()
