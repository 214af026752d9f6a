"""The log in memory and in the store: bounded whatever the store does, never lagging for longer than it must, and no
sweep trusts a store that has changed behind it."""

import asyncio
import threading
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest

from equipoise_server.engine import Durability, PolicyRunner, tables
from equipoise_server.engine import applier as applier_module
from equipoise_server.engine.log import ENTRY_MEMORY_BYTES
from equipoise_server.errors import draining
from equipoise_server.store import EmbeddedRedis, LogLost, RedisStore, StoreError, Unavailable
from tests.server.engine.conftest import Servers
from tests.server.engine.runs import PAGE, everything, send, spec, steps, until

NUM_EXAMPLES = 2 * PAGE + 100


class BadStore(RedisStore):
    """A store whose writes can be made slow, or fail, or be followed by something."""

    append_s = 0.0
    page_s = 0.0
    pages = 0
    waiting = 0
    """Pages that wait now."""
    max_pages = 1 << 30
    """Beyond so many, pages wait."""
    holds_republication = False
    full = False
    after_trim: Callable[[], None] | None = None

    async def append(self, *arguments: Any) -> None:
        if self.full:
            raise Unavailable("injected", kind="oom")
        await asyncio.sleep(self.append_s)
        await super().append(*arguments)

    async def write_page(self, *arguments: Any, **options: Any) -> None:
        if self.full:
            raise Unavailable("injected", kind="oom")
        await asyncio.sleep(self.page_s)
        self.waiting += 1
        while self.pages >= self.max_pages:
            await asyncio.sleep(0.001)
        self.waiting -= 1
        self.pages += 1
        await super().write_page(*arguments, **options)

    async def republish(self, *arguments: Any, **options: Any) -> Any:
        if self.full:
            raise Unavailable("injected", kind="oom")
        while self.holds_republication:
            await asyncio.sleep(0.001)
        return await super().republish(*arguments, **options)

    async def trim(self, *arguments: Any, **options: Any) -> None:
        await super().trim(*arguments, **options)
        if self.after_trim is not None:
            self.after_trim()


async def bad(servers: Servers, redis: EmbeddedRedis, **limits: float) -> tuple[PolicyRunner, BadStore]:
    store = BadStore.connect(redis.url)
    assert isinstance(store, BadStore)
    engine = await servers.make(store=store, **limits)
    await engine.create(spec(durability=Durability.BEHIND))
    return await engine.runner("policy"), store


async def assert_taken_over(servers: Servers, runner: PolicyRunner) -> None:
    expected = await everything(runner)
    assert await runner.log.flush(timeout_s=60)
    after = await (await servers.make("127.0.0.1:2")).runner("policy")
    assert await everything(after) == expected


@pytest.mark.parametrize(("batch", "count", "append_s"), [(8, 300, 0.2), (2000, 300, 0.03)])
async def test_a_slow_store_slows_the_steps_and_fills_no_memory(
    servers: Servers, redis: EmbeddedRedis, batch: int, count: int, append_s: float
) -> None:
    bound, one_call = 1 << 14, applier_module.STEPS_PER_CALL * (28 * batch + 2 * ENTRY_MEMORY_BYTES)
    runner, store = await bad(servers, redis, max_backlog_bytes=bound)
    store.append_s = append_s
    largest = 0
    futures = []
    for step in islice(steps(NUM_EXAMPLES, batch=batch), count):
        futures.append(await runner.submit(step))
        largest = max(largest, runner.log.tail.size)
    await asyncio.gather(*futures)
    assert largest <= bound + one_call
    assert count * (16 * batch + ENTRY_MEMORY_BYTES) > 2 * (bound + one_call)  # what would be there without a bound
    await assert_taken_over(servers, runner)


async def test_a_store_that_fails_for_long_gets_the_tables_and_meanwhile_fills_no_memory(
    servers: Servers, redis: EmbeddedRedis
) -> None:
    bound = 1 << 18
    runner, store = await bad(servers, redis, max_backlog_bytes=bound)
    store.full = True
    for step in islice(steps(NUM_EXAMPLES, batch=2000), 100):
        await asyncio.wait_for(send(runner, step), 60)  # training goes on
        assert runner.log.tail.size < 2 * bound
    generation = runner.owner.generation
    store.full = False
    await assert_taken_over(servers, runner)
    assert runner.owner.generation != generation


async def test_answers_wait_for_the_log_again_once_the_version_of_the_stall_is_durable(
    servers: Servers, redis: EmbeddedRedis
) -> None:
    """Also while more steps come than the store ever catches up with."""
    store = BadStore.connect(redis.url)
    assert isinstance(store, BadStore)
    engine = await servers.make(store=store, log_timeout_s=0.1)
    await engine.create(spec())
    runner = await engine.runner("policy")
    given = {name: steps(NUM_EXAMPLES, batch=10, trainer_id=name) for name in ("a", "b", "c", "d")}
    stop = False
    durable: list[tuple[float, bool]] = []
    loop = asyncio.get_running_loop()

    async def train(name: str) -> None:
        for step in given[name]:
            answer = await send(runner, step)
            durable.append((loop.time(), runner.durable_sequence(name) >= answer.sequence))
            if stop:
                return

    training = [asyncio.create_task(train(name)) for name in given]
    store.append_s = 0.3
    async with asyncio.timeout(60):
        while all(was for _, was in durable):
            await asyncio.sleep(0.01)
        store.append_s = 0.005
        lagged_at = loop.time()

        def lags() -> bool:
            """Whether any answer of the last 0.3 s came before its step was durable."""
            newest = [was for at, was in durable if at > loop.time() - 0.3]
            return loop.time() < lagged_at + 0.3 or not newest or not all(newest)

        while lags():
            await asyncio.sleep(0.01)
    stop = True
    await asyncio.gather(*training)


async def test_a_sweep_that_outlives_a_republication_loses_nothing(servers: Servers, redis: EmbeddedRedis) -> None:
    runner, store = await bad(servers, redis, max_backlog_bytes=1 << 16)
    given = steps(NUM_EXAMPLES, batch=2000)
    for _ in range(5):
        await send(runner, next(given))
    store.page_s = 0.2
    sweeping = asyncio.create_task(runner.sweep())
    while not store.pages:  # all pages are captured; the second is being written
        await asyncio.sleep(0.01)
    store.full = True
    generation = runner.owner.generation
    for _ in range(10):
        await send(runner, next(given))
    store.full = False
    store.page_s = 0.0
    async with asyncio.timeout(60):
        while runner.owner.generation == generation:
            await asyncio.sleep(0.01)
    with pytest.raises(StoreError):
        await sweeping
    await send(runner, next(steps(100, first=16)))  # ids below 100: page 0 only
    assert await runner.log.flush(timeout_s=60)
    await runner.sweep()
    await assert_taken_over(servers, runner)


async def test_a_sweep_that_ends_beside_a_republication_does_not_leave_pages_clean_that_the_new_keys_lack(
    servers: Servers, redis: EmbeddedRedis
) -> None:
    """The pages of the new keys are of the republication's version; what a sweep wrote, it wrote to the old ones."""
    runner, store = await bad(servers, redis)
    given = steps(NUM_EXAMPLES, batch=2000)
    for _ in range(5):
        await send(runner, next(given))
    assert await runner.log.flush(timeout_s=60)
    for sweeps_first in (False, True):
        for _ in range(3):
            await send(runner, next(given))
        assert await runner.log.flush(timeout_s=60)
        store.holds_republication = True
        store.max_pages = store.pages  # the next page waits
        sweeping = asyncio.create_task(runner.sweep()) if sweeps_first else None
        if sweeping:
            await until(lambda: store.waiting)
        runner.log.lose(None)  # as when Redis was flushed
        await until(lambda: runner.log.record.republishing)
        for _ in range(3):
            await send(runner, next(given))
        store.max_pages = 1 << 30
        with pytest.raises(StoreError):
            await asyncio.wait_for(sweeping or runner.sweep(), 60)
        store.holds_republication = False
        assert await runner.log.flush(timeout_s=60)
        await runner.sweep()
        await send(runner, next(given))
    await assert_taken_over(servers, runner)


async def test_a_rollback_that_is_noticed_while_the_log_is_trimmed_ends_the_sweep_alone(
    servers: Servers, redis: EmbeddedRedis
) -> None:
    runner, store = await bad(servers, redis)
    given = steps(NUM_EXAMPLES)
    for _ in range(20):
        await send(runner, next(given))
    assert await runner.log.flush(timeout_s=60)
    store.after_trim = lambda: runner.log._rewind(17)
    with pytest.raises(StoreError):
        await runner.sweep()
    store.after_trim = None
    for _ in range(3):
        await send(runner, next(given))
    await runner.sweep()
    await send(runner, next(given))
    await assert_taken_over(servers, runner)


async def test_pages_of_a_sweep_that_failed_are_dirty_again(
    servers: Servers, redis: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, _ = await bad(servers, redis)
    given = steps(NUM_EXAMPLES, batch=2000)
    for _ in range(3):
        await send(runner, next(given))
    with monkeypatch.context() as fault:

        def out_of_memory(*_: object) -> None:
            raise MemoryError("injected")

        fault.setattr(tables, "capture_page", out_of_memory)
        with pytest.raises(MemoryError):
            await runner.sweep()
    assert runner.policy.dirty_pages.all()
    await runner.sweep()
    await send(runner, next(given))
    await assert_taken_over(servers, runner)


async def test_a_capture_that_outlives_its_sweep_leaves_no_page_clean(servers: Servers, redis: EmbeddedRedis) -> None:
    """As at a drain that comes while a sweep waits for a busy device."""
    runner, _ = await bad(servers, redis)
    given = steps(NUM_EXAMPLES, batch=2000)
    for _ in range(3):
        await send(runner, next(given))
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        release.wait(30)

    sweeping = asyncio.create_task(runner.sweep())
    while not held.is_set():
        holding = asyncio.create_task(runner._device.run(hold))
        await asyncio.to_thread(held.wait, 30)
    await asyncio.sleep(0.05)
    sweeping.cancel()
    await asyncio.wait([sweeping])
    release.set()
    await holding
    await runner.read(lambda policy: None)  # behind the capture
    await runner.sweep()
    await send(runner, next(given))
    await assert_taken_over(servers, runner)


async def test_a_redis_that_is_flushed_is_filled_again_though_nobody_makes_a_step(
    servers: Servers, redis: EmbeddedRedis
) -> None:
    for way in ("heartbeat", "stop"):
        store = RedisStore.connect(redis.url)
        engine = await servers.make(store=store)
        await engine.create(spec(way))
        runner = await engine.runner(way)
        for step in islice(steps(NUM_EXAMPLES), 5):
            await send(runner, step)
        expected = await everything(runner)
        await store._commands.run("flush", "FLUSHALL")
        if way == "heartbeat":
            await engine.check_fences()
            async with asyncio.timeout(60):
                while runner.log.is_behind:
                    await asyncio.sleep(0.01)
        else:
            await engine.close(draining(), flush_timeout_s=60)
        assert await everything(await (await servers.make("127.0.0.1:2")).runner(way)) == expected


async def test_pages_that_redis_forgot_in_mid_sweep_are_written_again(servers: Servers, redis: EmbeddedRedis) -> None:
    """A Redis that is restarted with its last snapshot while nobody makes a step: no append would notice."""
    runner, store = await bad(servers, redis)
    given = steps(NUM_EXAMPLES, batch=2000)
    for _ in range(3):
        await send(runner, next(given))
    assert await runner.log.flush(timeout_s=60)
    store.max_pages = 2
    sweeping = asyncio.create_task(runner.sweep())
    while store.pages < 2:
        await asyncio.sleep(0.005)
    await store._commands.run("forget", "HSET", "equipoise:{policy}:owner", "batched", 0)
    await store._commands.run("forget", "UNLINK", f"equipoise:{{policy}}:{runner.owner.generation}:page:0")
    store.max_pages = 1 << 30
    with pytest.raises(LogLost):
        await sweeping
    runner.log.lose(3)  # as the sweeper does
    await runner.sweep()
    await send(runner, next(given))
    await assert_taken_over(servers, runner)
