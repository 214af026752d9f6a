"""The life of a policy in service: loaded by a task of the engine, ended in one way, and back after a bug."""

import asyncio
import gc
import itertools
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Generator
from itertools import islice
from typing import Any

import pytest

from equipoise_server.engine import Durability, Engine, Kind, Outcome, Session, State, Step, persistence
from equipoise_server.engine.applier import Applier
from equipoise_server.engine.persistence import Persistence
from equipoise_server.errors import Code, ServiceError, draining
from equipoise_server.store import EmbeddedRedis, RedisStore, Unavailable
from tests.server.engine.conftest import Servers
from tests.server.engine.runs import Whole, everything, send, spec, steps

NUM_EXAMPLES = 3000


class Interrupted:
    """A coroutine into which an error is thrown where it is suspended for the `at`-th time."""

    def __init__(self, work: Coroutine[Any, Any, None], *, at: int) -> None:
        self._work = work
        self._left = at
        self.thrown = self.ended = False

    def disarm(self) -> None:
        """Nothing is thrown any more."""
        self._left = 0

    def __await__(self) -> Generator[Any, Any, None]:
        suspended = self._work.__await__()
        try:
            waits_for = next(suspended)
            while True:
                self._left -= 1
                if self._left == 0:
                    self.thrown = True
                    waits_for = suspended.throw(RuntimeError("injected"))
                else:
                    try:
                        sent = yield waits_for
                    except BaseException as error:
                        waits_for = suspended.throw(error)
                    else:
                        waits_for = suspended.send(sent)
        except StopIteration:
            return
        except BaseException:
            self.ended = True
            raise


async def calm(servers: Servers, count: int) -> Whole:
    """The policy after so many steps, without any fault."""
    engine = await servers.make()
    await engine.create(spec("calm", num_examples=NUM_EXAMPLES))
    runner = await engine.runner("calm")
    for step in islice(steps(NUM_EXAMPLES), count):
        await send(runner, step)
    return await everything(runner)


async def answer_or_error(waiting: Awaitable[Any]) -> Any:
    try:
        return await asyncio.wait_for(asyncio.ensure_future(waiting), 60)
    except ServiceError as error:
        return error


TASKS = {
    "steps": (Applier, "run"),
    "log": (Persistence, "write"),
    "sweep": (Persistence, "sweep_when_due"),
}


@pytest.mark.parametrize(
    ("task", "durability"),
    [
        ("steps", Durability.LOGGED),
        ("steps", Durability.BEHIND),
        ("log", Durability.LOGGED),
        pytest.param("sweep", Durability.LOGGED, marks=pytest.mark.slow),  # some thirty awaits
    ],
)
async def test_a_bug_at_any_await_ends_the_policy_with_an_id_and_it_comes_back_whole(
    servers: Servers, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], task: str,
    durability: Durability,
) -> None:  # fmt: skip
    """Every await of the task in turn, until the task has no such await any more."""
    monkeypatch.setattr(persistence, "SWEEP_RETRY_S", 0.01)
    expected = await calm(servers, 12)
    holder, method = TASKS[task]
    work: Callable[[Any], Coroutine[Any, Any, None]] = getattr(holder, method)
    ended_by_bug = 0
    for at in itertools.count(1):
        name = f"policy-{at}"
        injected: list[Interrupted] = []

        async def interrupted(holder: Any, at: int = at, injected: list[Interrupted] = injected) -> None:
            injected.append(Interrupted(work(holder), at=at if not injected else 0))
            await injected[-1]

        monkeypatch.setattr(holder, method, interrupted)
        engine = await servers.make(max_replay_s=0.0)  # a sweep is always due
        await engine.create(spec(name, num_examples=NUM_EXAMPLES, durability=durability))
        runner = await engine.runner(name)
        session: Session | None = None
        answers: list[Any] = []
        try:
            session, _ = await asyncio.wait_for(runner.open("trainer"), 60)
        except ServiceError as error:
            answers.append(error)
        given = list(islice(steps(NUM_EXAMPLES), 12))
        for start in range(0, 12, 4):
            try:
                futures = [await asyncio.wait_for(runner.submit(step), 60) for step in given[start : start + 4]]
            except ServiceError as error:
                answers.append(error)
                break
            answers += [await answer_or_error(future) for future in futures]
        async with asyncio.timeout(60):  # a sweep may still be under way
            while not injected[0].thrown and (runner.log.is_behind or runner.log.long.is_set()):
                await asyncio.sleep(0.01)
        for _ in range(50):
            await asyncio.sleep(0)
        injected[0].disarm()  # the checks below are about what has happened so far
        for _ in range(50 if injected[0].thrown else 0):
            await asyncio.sleep(0.01 if runner.closed is None else 0)
        refused = [answer for answer in answers if isinstance(answer, ServiceError)]
        async with asyncio.timeout(60):  # a policy that ends may take a while for it
            while runner.closed is None and (refused or (injected[0].thrown and injected[0].ended)):
                await asyncio.sleep(0.01)
        if runner.closed is not None:
            ended_by_bug += 1
            ends = refused + ([await asyncio.wait_for(session.ended, 60)] if session else [])
            assert {(end.code, end.reason) for end in ends} == {(Code.INTERNAL, "BUG")}
            (error_id,) = {end.metadata["error_id"] for end in ends}
            assert error_id in capsys.readouterr().out
        # Else there is no such await, or it was the store's own: a fault of Redis, which is asked again.
        again = await engine.runner(name)
        _, opening = await again.open("trainer")
        for step in given[opening.last_sequence :]:
            assert (await send(again, step)).outcome is Outcome.APPLIED
        assert (await everything(again)).columns == expected.columns
        await engine.close(draining(), flush_timeout_s=60)
        if not injected[0].thrown:
            break
    assert ended_by_bug >= 2


class SlowStore(RedisStore):
    """A store each of whose reads of a page takes a while, and fails at first, as often as is asked for."""

    delay_s = 0.0
    failures = 0

    async def read_page(self, policy: Any, index: int, *, version: int | None = None) -> Any:
        await asyncio.sleep(self.delay_s)
        if self.failures:
            self.failures -= 1
            raise Unavailable("injected", kind="timeout")
        return await super().read_page(policy, index, version=version)


async def slow_engine(
    servers: Servers, redis: EmbeddedRedis, *, delay_s: float = 0.0, failures: int = 0, **limits: float
) -> Engine:
    store = SlowStore.connect(redis.url)
    assert isinstance(store, SlowStore)
    store.delay_s, store.failures = delay_s, failures
    return await servers.make("127.0.0.1:2", store=store, **limits)


async def swept(servers: Servers) -> Whole:
    """A policy with pages and a log in the store; nobody serves it any more."""
    engine = await servers.make()
    await engine.create(spec())
    runner = await engine.runner("policy")
    for step in islice(steps(NUM_EXAMPLES), 5):
        await send(runner, step)
    await runner.sweep()
    for step in islice(steps(NUM_EXAMPLES), 5, 8):
        await send(runner, step)
    expected = await everything(runner)
    await engine.close(draining(), flush_timeout_s=0.0)
    return expected


async def test_loading_outlives_its_callers_who_are_told_how_far_it_is(servers: Servers, redis: EmbeddedRedis) -> None:
    expected = await swept(servers)
    engine = await slow_engine(servers, redis, delay_s=0.5, load_wait_s=0.0)
    entries = "0"
    async with asyncio.timeout(60):
        while entries == "0":  # how many there are is what it asks first
            await asyncio.sleep(0.01)
            with pytest.raises(ServiceError) as caught:
                await engine.runner("policy")
            entries = caught.value.metadata["entries"]
    assert (caught.value.code, caught.value.reason) == (Code.UNAVAILABLE, "LOADING")
    assert caught.value.metadata == {"replayed": "0", "entries": "3"}
    assert caught.value.retry_after_s
    impatient = asyncio.create_task(engine.runner("policy", wait_s=20))
    await asyncio.sleep(0)
    impatient.cancel()
    runner = await engine.runner("policy", wait_s=20)
    assert await everything(runner) == expected
    assert runner.epoch == 2  # it was acquired once


async def test_loading_asks_a_store_again_that_does_not_answer(servers: Servers, redis: EmbeddedRedis) -> None:
    expected = await swept(servers)
    engine = await slow_engine(servers, redis, failures=3)
    assert await everything(await engine.runner("policy")) == expected


async def test_a_store_that_goes_on_failing_is_named_to_who_waits(servers: Servers, redis: EmbeddedRedis) -> None:
    await swept(servers)
    engine = await slow_engine(servers, redis, failures=1000, load_wait_s=0.1)
    with pytest.raises(ServiceError) as caught:
        await engine.runner("policy")
    assert caught.value.reason == "STATE_STORE_DOWN"
    await engine.delete("policy")  # ends the loading
    with pytest.raises(ServiceError) as caught:
        await engine.runner("policy")
    assert caught.value.reason == "POLICY_NOT_FOUND"


async def test_a_server_that_stops_ends_its_loadings_and_leaves_the_policy_to_others(
    servers: Servers, redis: EmbeddedRedis
) -> None:
    expected = await swept(servers)
    engine = await slow_engine(servers, redis, delay_s=30.0)
    waiting = asyncio.create_task(engine.runner("policy"))
    while not engine.loadings:
        await asyncio.sleep(0)
    await engine.close(draining(), flush_timeout_s=60)
    with pytest.raises(ServiceError) as caught:
        await waiting
    assert caught.value.reason == "DRAINING"
    assert await everything(await (await servers.make()).runner("policy")) == expected


async def test_every_step_that_was_taken_is_answered_when_the_policy_closes(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that wait, those that are being applied, and those that wait for room in the queue."""
    engine = await servers.make(max_queued_steps=4)
    await engine.create(spec())
    runner = await engine.runner("policy")
    held, release = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def hold(policy: object) -> None:
        loop.call_soon_threadsafe(held.set)
        asyncio.run_coroutine_threadsafe(release.wait(), loop).result(30)

    holding = asyncio.create_task(runner.read(hold))
    await held.wait()
    given = steps(NUM_EXAMPLES)
    futures = [await runner.submit(next(given))]
    while len(runner.queue):  # the first one is taken and waits for the device
        await asyncio.sleep(0)
    futures += [await runner.submit(next(given)) for _ in range(4)]
    waiting = [asyncio.create_task(runner.submit(next(given))) for _ in range(3)]
    await asyncio.sleep(0)
    deleting = asyncio.create_task(engine.delete("policy"))
    ended = [await answer_or_error(future) for future in futures]
    ended += [await answer_or_error(task) for task in waiting]
    assert {getattr(end, "reason", end) for end in ended} == {"POLICY_DELETED"}
    release.set()
    await asyncio.gather(deleting, holding)
    assert runner.state is State.CLOSED


async def test_whoever_stops_a_policy_second_waits_for_the_first(servers: Servers, redis: EmbeddedRedis) -> None:
    """As SIGTERM does where no stream is open: it ends the hand-over while that still writes."""
    store = RedisStore.connect(redis.url)
    engine = await servers.make(store=store)
    await engine.create(spec(durability=Durability.BEHIND))
    runner = await engine.runner("policy")
    append = store.append

    async def slow_append(*arguments: Any) -> None:
        await asyncio.sleep(0.05)
        await append(*arguments)

    store.append = slow_append  # type: ignore[method-assign]
    for step in islice(steps(NUM_EXAMPLES), 30):
        await send(runner, step)
    handing_over = asyncio.create_task(engine.hand_over(draining(), flush_timeout_s=60))
    await asyncio.sleep(0.02)
    handing_over.cancel()
    await asyncio.wait([handing_over])
    await engine.close(draining(), flush_timeout_s=60)
    assert (await (await servers.make()).runner("policy")).policy.version == 30


async def test_a_policy_that_stops_in_order_leaves_no_long_log(servers: Servers, redis: EmbeddedRedis) -> None:
    engine = await servers.make()
    await engine.create(spec())
    runner = await engine.runner("policy")
    for step in islice(steps(NUM_EXAMPLES), 5):
        await send(runner, step)
    runner.log.record.log_replay_s = 10.0  # as after many more
    await engine.close(draining(), flush_timeout_s=60)
    store = RedisStore.connect(redis.url)
    assert (await store.log_state("policy")).entries == 0
    await store.close()
    assert (await (await servers.make()).runner("policy")).policy.version == 5


async def test_a_log_whose_replay_would_take_long_is_swept(servers: Servers, redis: EmbeddedRedis) -> None:
    engine = await servers.make(max_replay_s=20 * 4e-5)
    await engine.create(spec())
    runner = await engine.runner("policy")
    given = steps(NUM_EXAMPLES, batch=10)
    async with asyncio.timeout(60):
        while not runner.log.record.base:
            await send(runner, next(given))
    expected = await everything(runner)
    assert await everything(await (await servers.make()).runner("policy")) == expected


async def test_the_tables_of_a_closed_policy_leave_memory_at_once(servers: Servers) -> None:
    engine = await servers.make()
    gc.disable()
    try:
        for end in ("delete", "unload"):
            await engine.create(spec(end))
            runner = await engine.runner(end)
            await send(runner, next(steps(NUM_EXAMPLES)))
            tables = [weakref.ref(column) for column in runner.policy.state.columns.values()]
            assert all(table() is not None for table in tables)
            await (engine.delete(end) if end == "delete" else engine.unload_idle(idle_s=-1.0))
            assert [table() for table in tables] == [None] * len(tables)
    finally:
        gc.enable()


async def test_a_policy_deleted_and_created_again_elsewhere_is_known_for_dead_here(servers: Servers) -> None:
    here, there = await servers.make("127.0.0.1:1"), await servers.make("127.0.0.1:2")
    await here.create(spec())
    runner = await here.runner("policy")
    session, _ = await runner.open("trainer")
    await there.delete("policy")
    await there.create(spec(num_examples=5))
    await here.check_fences()
    assert (await asyncio.wait_for(session.ended, 60)).reason == "POLICY_DELETED"
    assert (await here.find("policy")).uid != runner.policy.uid
    assert (await here.runner("policy")).policy.spec.num_examples == 5


async def test_a_late_append_to_a_deleted_policy_is_told_as_deleted(servers: Servers) -> None:
    here, there = await servers.make("127.0.0.1:1"), await servers.make("127.0.0.1:2")
    await here.create(spec())
    runner = await here.runner("policy")
    await there.delete("policy")
    await there.create(spec(num_examples=5))
    await there.runner("policy")
    assert (await answer_or_error(await runner.submit(next(steps(5))))).reason == "POLICY_DELETED"


async def test_a_bug_in_a_read_is_its_caller_s_alone(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = await servers.make()
    await engine.create(spec())
    runner = await engine.runner("policy")

    def injected(*_: object) -> object:
        raise ValueError("injected")

    with monkeypatch.context() as bug:
        bug.setattr(runner.policy, "_answer", injected)
        with pytest.raises(ValueError, match="injected"):
            await send(runner, Step(kind=Kind.READ))
    assert (await send(runner, next(steps(NUM_EXAMPLES)))).outcome is Outcome.APPLIED


async def test_looking_after_policies_keeps_none_of_them_in_use(servers: Servers) -> None:
    engine = await servers.make()
    await engine.create(spec())
    runner = await engine.runner("policy")
    async with asyncio.timeout(60):
        while engine.runners:
            await engine.check_fences()
            await engine.unload_idle(idle_s=0.2)
            await asyncio.sleep(0.02)
    assert runner.state is State.CLOSED


async def test_trainers_of_unary_calls_are_forgotten_too(servers: Servers) -> None:
    now = 1e9
    engine = await servers.make(wall_clock=lambda: now)
    await engine.create(spec())
    runner = await engine.runner("policy")
    await send(runner, next(steps(NUM_EXAMPLES, trainer_id="unary")))
    now += 90_000
    await engine.unload_idle(idle_s=1e9)
    assert not runner.policy.trainers.known


async def test_a_load_that_is_cancelled_before_it_begins_does_not_stay(servers: Servers) -> None:
    engine = await servers.make()
    await engine.create(spec())
    asking = asyncio.create_task(engine.runner("policy"))
    while not engine._loads:
        await asyncio.sleep(0)
    engine._loads["policy"][1].cancel()
    await asyncio.wait([asking])
    assert (await asking).policy.version == 0


async def test_a_stream_that_opens_while_the_policy_is_handed_over_is_asked_to_leave(servers: Servers) -> None:
    engine = await servers.make()
    await engine.create(spec())
    runner = await engine.runner("policy")
    session, _ = await runner.open("trainer")
    runner.drain()
    asked = []
    session.when_draining(lambda: asked.append(True))  # the stream is only now set up
    assert asked == [True]


async def test_waiting_for_a_policy_that_takes_long_to_load_ends_in_time(
    servers: Servers, redis: EmbeddedRedis
) -> None:
    await swept(servers)
    engine = await slow_engine(servers, redis, delay_s=60.0)
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(ServiceError):
        await engine.runner("policy", wait_s=0.2)
    assert loop.time() - began < 40


async def test_what_ends_a_policy_is_an_error_of_its_own_for_each_caller(servers: Servers) -> None:
    engine = await servers.make()
    await engine.create(spec())
    runner = await engine.runner("policy")
    await engine.delete("policy")
    errors = []
    for _ in range(3):
        with pytest.raises(ServiceError) as caught:
            await runner.read(lambda policy: None)
        errors.append(caught.value)
    assert len({id(error) for error in errors}) == 3
    assert {error.reason for error in errors} == {"POLICY_DELETED"}


async def test_a_policy_whose_end_goes_wrong_in_one_part_ends_all_the_same(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("finish", "release"):
        engine = await servers.make()
        await engine.create(spec(part))
        runner = await engine.runner(part)
        session, _ = await runner.open("trainer")

        async def fail(*_: object, **__: object) -> None:
            raise RuntimeError("injected")

        with monkeypatch.context() as bug:
            bug.setattr(Persistence, part, fail)
            await asyncio.wait_for(runner.stop(draining(), flush_timeout_s=60), 60)
        assert runner.state is State.CLOSED
        assert (await asyncio.wait_for(session.ended, 60)).reason == "DRAINING"
        assert engine.runners == []
