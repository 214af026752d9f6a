"""How policies are served, as the metrics show it: how far behind the store is, what is loading, what rests."""

import asyncio
from collections import Counter
from itertools import islice
from typing import Any

import pytest

from equipoise_server.engine import Durability, Engine, NoTelemetry, PolicyRunner, ServiceStatus
from equipoise_server.engine.log import LogTail
from equipoise_server.errors import ServiceError, draining
from equipoise_server.store import EmbeddedRedis, LogEntry, Page, RedisStore, Unavailable
from tests.server.engine.conftest import Servers
from tests.server.engine.runs import PAGE, send, spec, steps, until

NUM_EXAMPLES = 2 * PAGE + 100


class Gate(RedisStore):
    """A store that takes nothing, or shows no second page, while a test says so."""

    full = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.may_read = asyncio.Event()
        self.may_read.set()

    async def append(self, *arguments: Any) -> None:
        self._check()
        await super().append(*arguments)

    async def republish(self, *arguments: Any, **options: Any) -> Any:
        self._check()
        return await super().republish(*arguments, **options)

    async def read_page(self, policy: Any, index: int, *, version: int | None = None) -> Page | None:
        if index:
            await self.may_read.wait()
        return await super().read_page(policy, index, version=version)

    def _check(self) -> None:
        if self.full:
            raise Unavailable("injected", kind="oom")


class Heard(NoTelemetry):
    """Telemetry that remembers why policies left and were not loaded."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()

    def left(self, *, reason: str) -> None:
        self.reasons[f"left {reason}"] += 1

    def not_loaded(self, *, reason: str) -> None:
        self.reasons[f"not loaded {reason}"] += 1

    def refused(self, *, reason: str) -> None:
        self.reasons[f"refused {reason}"] += 1


def gate(redis: EmbeddedRedis) -> Gate:
    store = Gate.connect(redis.url)
    assert isinstance(store, Gate)
    return store


async def in_service(engine: Engine, name: str = "policy", *, count: int = 3, num_examples: int = 100) -> PolicyRunner:
    await engine.create(spec(name, num_examples=num_examples))
    runner = await engine.runner(name)
    for step in islice(steps(num_examples, batch=10), count):
        await send(runner, step)
    return runner


def of(engine: Engine, name: str = "policy") -> ServiceStatus | None:
    return next((each for each in engine.services if each.policy.name == name), None)


def test_the_oldest_entry_that_the_store_lacks_tells_the_lag() -> None:
    now = 100.0
    tail = LogTail(5, clock=lambda: now)
    assert tail.age_s(5) == 0.0
    for version in (6, 7, 8):
        tail.add(LogEntry(version=version, fields={}), replay_s=0.0)
        now += 1.0
    assert [tail.age_s(durable) for durable in (5, 6, 7, 8)] == [3.0, 2.0, 1.0, 0.0]
    tail.forget(7)
    assert tail.age_s(5) == 1.0  # what is older is not kept: the oldest that is
    assert tail.age_s(8) == 0.0


@pytest.mark.parametrize("max_backlog_bytes", [1 << 28, 1 << 14])
async def test_a_policy_whose_store_fails_lags_and_healthy_ones_do_not(
    servers: Servers, redis: EmbeddedRedis, max_backlog_bytes: int
) -> None:
    """Also when the log in memory is full and let go: then the tables are what the store lacks."""
    store = gate(redis)
    engine = await servers.make(store=store, max_backlog_bytes=max_backlog_bytes)
    healthy = await servers.make("127.0.0.1:2")
    other = await in_service(healthy, "other")
    await engine.create(spec(num_examples=100, durability=Durability.BEHIND))
    runner = await engine.runner("policy")
    assert runner.service.lag_s == 0.0
    store.full = True
    for step in islice(steps(100, batch=200), 40):
        await send(runner, step)
    await until(lambda: runner.service.lag_s > 0.2)
    before = runner.service.lag_s
    await until(lambda: runner.service.lag_s > before + 0.1)  # it grows
    assert other.service.lag_s == 0.0
    assert other.service.unpersisted == 0
    store.full = False
    await until(lambda: runner.service.lag_s == 0.0)
    assert runner.service.unpersisted == 0


async def test_a_flushed_store_is_a_lag_until_it_has_everything_again(servers: Servers, redis: EmbeddedRedis) -> None:
    store = gate(redis)
    runner = await in_service(await servers.make(store=store))
    store.full = True
    runner.log.lose(None)
    await until(lambda: runner.service.lag_s > 0.1)
    store.full = False
    await until(lambda: runner.service.lag_s == 0.0)


async def test_what_is_served_is_told(servers: Servers) -> None:
    now = 1000.0
    engine = await servers.make(wall_clock=lambda: now)
    await engine.create(spec(num_examples=100))
    runner = await engine.runner("policy")
    assert runner.service.stepped_at is None
    session, _ = await runner.open("trainer")
    for step in islice(steps(100, batch=10), 3):
        await send(runner, step)
    told = runner.service
    assert (told.trainers, told.known_trainers, told.stepped_at) == (1, 1, 1000.0)
    assert (told.log_entries, told.policy.progress.version) == (3, 3)
    assert told.log_bytes > 0
    assert told.table_bytes == told.policy.table_bytes > 0
    runner.close_session(session)
    await runner.sweep()
    assert (runner.service.trainers, runner.service.log_entries, runner.service.log_bytes) == (0, 0, 0)
    now = 2000.0
    await engine.close(draining(), flush_timeout_s=60)
    again = await (await servers.make("127.0.0.1:2")).runner("policy")
    assert again.service.stepped_at == 1000.0  # a restart is no step


async def test_an_unused_policy_rests_as_it_stood_and_comes_back(servers: Servers) -> None:
    heard = Heard()
    engine = await servers.make(telemetry=heard)
    await in_service(engine)
    await engine.unload_idle(idle_s=0.0)
    assert engine.runners == []
    resting = of(engine)
    assert resting is not None
    assert not resting.in_memory
    assert (resting.policy.progress.version, resting.table_bytes, resting.known_trainers) == (3, 0, 1)
    await engine.unload_idle(idle_s=0.0)
    assert of(engine) is not None  # nobody else has taken it
    await engine.runner("policy")
    [back] = engine.services
    assert back.in_memory
    assert heard.reasons == {"left UNLOADED": 1}


async def test_a_resting_policy_is_forgotten_where_it_is_deleted(servers: Servers) -> None:
    here, there = await servers.make(), await servers.make("127.0.0.1:2")
    for name in ("here", "there"):
        await in_service(here, name)
    await here.unload_idle(idle_s=0.0)
    await here.delete("here")
    await there.delete("there")
    assert of(here, "here") is None
    await here.unload_idle(idle_s=60.0)
    assert here.services == []


async def test_a_resting_policy_is_forgotten_where_another_server_takes_it(servers: Servers) -> None:
    here, there = await servers.make(), await servers.make("127.0.0.1:2")
    await in_service(here)
    await here.unload_idle(idle_s=0.0)
    await there.runner("policy")
    assert of(here) is not None
    await here.unload_idle(idle_s=60.0)
    assert of(here) is None


async def test_a_policy_that_is_lost_or_handed_over_does_not_rest(servers: Servers) -> None:
    heard = Heard()
    here, there = await servers.make(telemetry=heard), await servers.make("127.0.0.1:2")
    await in_service(here, "taken")
    await in_service(here, "handed")
    await there.runner("taken")
    await here.check_fences()
    await until(lambda: of(here, "taken") is None)
    await here.close(draining(), flush_timeout_s=60)
    assert here.services == []
    assert heard.reasons == {"left FENCED": 1, "left DRAINING": 1}


async def test_a_policy_that_does_not_come_is_counted_by_its_reason(servers: Servers, redis: EmbeddedRedis) -> None:
    heard, store = Heard(), RedisStore.connect(redis.url)
    owner = await servers.make("127.0.0.1:2", instance="owner")
    await store.heartbeat("owner", address="127.0.0.1:2", ttl_s=60)
    await in_service(owner)
    other = await servers.make(telemetry=heard, instance="other")
    for name in ("policy", "nobody"):
        with pytest.raises(ServiceError):
            await other.runner(name)
    assert heard.reasons["not loaded NOT_OWNER"] == 1
    assert heard.reasons["not loaded POLICY_NOT_FOUND"] >= 1
    await store.close()


async def test_loading_tells_how_far_it_is(servers: Servers, redis: EmbeddedRedis) -> None:
    first = await servers.make()
    runner = await in_service(first, num_examples=NUM_EXAMPLES, count=2)
    await runner.sweep()
    for step in islice(steps(NUM_EXAMPLES, batch=10, first=3), 4):
        await send(runner, step)
    await first.close(draining(), flush_timeout_s=60)
    store = gate(redis)
    store.may_read.clear()
    second = await servers.make("127.0.0.1:2", store=store)
    arriving = asyncio.ensure_future(second.runner("policy"))
    await until(lambda: any(each.read_pages for each in second.loadings))
    [loading] = second.loadings
    assert (loading.read_pages, loading.pages, loading.replayed, loading.entries) == (1, 2, 0, 4)
    assert loading.seconds > 0
    store.may_read.set()
    await arriving
    assert (loading.read_pages, loading.replayed) == (2, 4)
    assert second.loadings == []
