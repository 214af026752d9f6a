"""What nobody needs any more is let go of at once, not when the garbage collector comes by."""

import asyncio
import gc
import weakref
from collections.abc import Callable, Iterator
from itertools import islice

import pytest
import torch
from redis.asyncio import Redis

from equipoise_server.engine import Engine, PolicyRunner
from equipoise_server.engine import policy as policy_module
from equipoise_server.errors import ServiceError, draining
from equipoise_server.rules import TableState
from equipoise_server.store import EmbeddedRedis, RedisStore
from tests.server.engine.conftest import Servers
from tests.server.engine.runs import send, spec, steps

NUM_EXAMPLES = spec().num_examples


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """How many tables of policies are in memory; the collector does not run meanwhile."""
    made: list[weakref.ref[torch.Tensor]] = []
    original = TableState.__init__

    def watched(self: TableState, *arguments: object, **named: object) -> None:
        original(self, *arguments, **named)  # type: ignore[arg-type]
        made.extend(weakref.ref(column) for column in self.columns.values() if column.device.type != "meta")

    monkeypatch.setattr(TableState, "__init__", watched)
    gc.collect()
    gc.disable()
    yield lambda: len({id(column) for ref in made if (column := ref()) is not None})
    gc.enable()


async def in_service(servers: Servers, *, rule: str = "ema_sign") -> tuple[Engine, PolicyRunner]:
    engine = await servers.make()
    await engine.create(spec(rule=rule))
    runner = await engine.runner("policy")
    for step in islice(steps(NUM_EXAMPLES), 3):
        await send(runner, step)
    await runner.sweep()
    for step in islice(steps(NUM_EXAMPLES), 3, 5):
        await send(runner, step)
    return engine, runner


@pytest.mark.parametrize("rule", ["ema_sign", "projected_gradient"])
async def test_tables_of_a_deleted_policy(servers: Servers, tables: Callable[[], int], rule: str) -> None:
    engine, runner = await in_service(servers, rule=rule)
    async with runner.snapshot() as snapshot:
        await send(runner, next(islice(steps(NUM_EXAMPLES), 5, None)))
        assert snapshot.num_pages
        assert tables()
        await engine.delete("policy")
    assert tables() == 0


async def test_tables_of_a_policy_that_is_unloaded(servers: Servers, tables: Callable[[], int]) -> None:
    engine, _ = await in_service(servers)
    await engine.unload_idle(idle_s=-1.0)
    assert engine.runners == []
    assert tables() == 0


async def test_tables_of_one_that_a_bug_has_ended(
    servers: Servers, tables: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, runner = await in_service(servers)

    def bug(*_: object, **__: object) -> None:
        raise AssertionError("injected")

    monkeypatch.setattr(policy_module.Policy, "apply", bug)
    with pytest.raises(ServiceError, match="internal error"):
        await send(runner, next(islice(steps(NUM_EXAMPLES), 5, None)))
    while engine.runners:
        await asyncio.sleep(0.01)
    assert tables() == 0


async def test_tables_of_one_that_cannot_be_loaded(
    servers: Servers, redis: EmbeddedRedis, tables: Callable[[], int]
) -> None:
    engine, _ = await in_service(servers)
    await engine.close(draining(), flush_timeout_s=60.0)
    client: Redis[bytes] = Redis(unix_socket_path=str(redis.socket))
    (page,) = [key for key in await client.keys() if key.endswith(b":page:1")]
    await client.delete(page)
    await client.aclose()
    other = await servers.make("127.0.0.1:2")
    for _ in range(3):
        with pytest.raises(ServiceError, match="page 1 is damaged"):
            await other.runner("policy")
    assert tables() == 0


class StalledStore(RedisStore):
    """A store whose pages never come."""

    async def read_page(self, *_: object, **__: object) -> None:  # type: ignore[override]
        await asyncio.Event().wait()


async def test_tables_of_one_that_is_deleted_while_it_is_loaded(
    servers: Servers, redis: EmbeddedRedis, tables: Callable[[], int]
) -> None:
    engine, _ = await in_service(servers)
    await engine.close(draining(), flush_timeout_s=60.0)
    assert tables() == 0
    other = await servers.make("127.0.0.1:2", store=StalledStore.connect(redis.url), load_wait_s=0.0)
    while not tables():
        with pytest.raises(ServiceError, match="is being loaded"):
            await other.runner("policy")
        await asyncio.sleep(0.01)
    await other.delete("policy")
    assert tables() == 0


async def test_names_that_nobody_has_leave_nothing(servers: Servers) -> None:
    engine = await servers.make()

    async def ask(first: int) -> int:
        for number in range(first, first + 50):
            with pytest.raises(ServiceError, match="does not exist"):
                await engine.runner(f"none-{number}")
        gc.collect()
        return len(gc.get_objects())

    before = await ask(0)  # what is made once
    for turn in range(1, 5):
        after = await ask(50 * turn)
    assert after - before < 50  # of 200 names
    assert engine.loadings == []
