"""Policies in service on a real Redis: taken over, swept, flushed, stalled, forked, deleted."""

import asyncio
import os
import signal
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from equipoise_server.engine import Durability, Engine, Outcome, Policy, PolicyRunner, Step
from equipoise_server.engine.memory import Backlogs
from equipoise_server.errors import ServiceError, draining
from equipoise_server.store import EmbeddedRedis, RedisStore
from tests.server.engine.conftest import Servers
from tests.server.engine.runs import PAGE, Whole, everything, fork, send, spec, steps


def assert_same(left: Whole, right: Whole) -> None:
    assert left.columns == right.columns
    assert left.header == right.header


async def runner_of(engine: Engine, **options: object) -> PolicyRunner:
    of = spec(**options)  # type: ignore[arg-type]
    await engine.create(of)
    return await engine.runner(of.name)


async def feed(runner: PolicyRunner, count: int, *, first: int = 1, batch: int = 200) -> None:
    """`count` steps, all in flight at once."""
    of = runner.policy.spec
    given = islice(steps(of.num_examples, rule=of.rule, batch=batch), first - 1, first - 1 + count)
    futures = [await runner.submit(step) for step in given]
    answers = await asyncio.gather(*futures)
    assert [answer.outcome for answer in answers] == [Outcome.APPLIED] * count
    assert [answer.version for answer in answers] == list(range(first, first + count))


async def send_until_refused(runner: PolicyRunner, given: Iterator[Step]) -> None:
    for step in given:
        await send(runner, step)
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("rule", ["ema_sign", "exponentiated_gradient", "projected_gradient", "rho", "boltzmann"])
async def test_a_second_server_takes_over_bit_for_bit_and_the_first_is_fenced(servers: Servers, rule: str) -> None:
    first, second = await servers.make(), await servers.make()
    before = await runner_of(first, rule=rule)
    await feed(before, 20)
    expected = await everything(before)
    session, _ = await before.open("late")
    after = await second.runner("policy")
    assert_same(await everything(after), expected)
    assert after.epoch == before.epoch + 1
    assert after.durable_sequence("trainer") == 20

    late = steps(before.policy.spec.num_examples, trainer_id="late")
    with pytest.raises(ServiceError) as caught:
        await send_until_refused(before, late)
    assert caught.value.reason == "FENCED"
    assert (await asyncio.wait_for(session.ended, 60)).reason == "FENCED"
    assert_same(await everything(after), expected)


@pytest.mark.parametrize("rule", ["ema_sign", "projected_gradient", "boltzmann", "learnability"])
async def test_a_sweep_trims_the_log_and_loses_nothing(servers: Servers, redis: EmbeddedRedis, rule: str) -> None:
    engine = await servers.make()
    runner = await runner_of(engine, rule=rule)
    await feed(runner, 10)
    await asyncio.gather(runner.sweep(), feed(runner, 15, first=11))
    store = RedisStore.connect(redis.url)
    swept = await store.log_state("policy")
    assert runner.log.record.base >= 10
    assert (swept.last_version, swept.entries) == (25, 25 - runner.log.record.base)
    await feed(runner, 5, first=26)
    expected = await everything(runner)
    assert_same(await everything(await (await servers.make()).runner("policy")), expected)
    await store.close()


@pytest.mark.parametrize("rule", ["ema_sign", "learnability"])
async def test_a_sweep_that_dies_half_way_loses_nothing(servers: Servers, redis: EmbeddedRedis, rule: str) -> None:
    slow = 1.0  # after its first page it waits for days
    engine = await servers.make(sweep_bytes_per_s=slow)
    runner = await runner_of(engine, rule=rule)
    await feed(runner, 10)
    store = RedisStore.connect(redis.url)
    sweeping = asyncio.create_task(runner.sweep())
    while await store.read_page("policy", 0) is None:
        await asyncio.sleep(0.01)
    await feed(runner, 10, first=11)
    expected = await everything(runner)
    sweeping.cancel()
    assert_same(await everything(await (await servers.make()).runner("policy")), expected)
    await store.close()


async def test_a_second_sweep_skips_clean_pages(servers: Servers, redis: EmbeddedRedis) -> None:
    engine = await servers.make()
    runner = await runner_of(engine)
    await feed(runner, 5)
    await runner.sweep()
    await send(runner, next(steps(100, first=6)))  # ids below 100: page 0 only
    await runner.sweep()
    store = RedisStore.connect(redis.url)
    versions = [(await store.read_page("policy", index)) for index in range(3)]
    assert [page.version for page in versions if page] == [6, 5, 5]
    expected = await everything(runner)
    assert_same(await everything(await (await servers.make()).runner("policy")), expected)
    await store.close()


@pytest.mark.parametrize("rule", ["ema_sign", "boltzmann"])
async def test_a_flushed_redis_gets_everything_back_from_memory(
    servers: Servers, redis: EmbeddedRedis, rule: str
) -> None:
    engine = await servers.make()
    runner = await runner_of(engine, rule=rule)
    await feed(runner, 10)
    await runner.sweep()
    store = RedisStore.connect(redis.url)
    await store._commands.run("flush", "FLUSHALL")
    assert await store.get("policy") is None
    await feed(runner, 10, first=11)
    assert await runner.log.flush(timeout_s=60)
    await feed(runner, 3, first=21)
    assert await runner.log.flush(timeout_s=60)
    expected = await everything(runner)
    after = await (await servers.make()).runner("policy")
    assert_same(await everything(after), expected)
    assert after.epoch > runner.epoch - 1
    await store.close()


async def test_a_redis_that_lost_a_sweep_loses_nothing_at_the_next(
    servers: Servers, redis: EmbeddedRedis, tmp_path: Path
) -> None:
    """A power loss may take the last commands away: here exactly those of a sweep, so that no version is missing."""
    engine = await servers.make()
    runner = await runner_of(engine)
    await feed(runner, 10)
    await runner.sweep()
    await feed(runner, 5, first=11)
    folder = tmp_path / "redis"
    (appended,) = (*folder.glob("appendonly.aof"), *folder.glob("appendonlydir/*.incr.aof"))  # until and since Redis 7
    before = appended.read_bytes()
    await runner.sweep()
    assert redis.pid is not None
    os.kill(redis.pid, signal.SIGKILL)
    await redis.wait()
    appended.write_bytes(before)
    await redis.restart()
    await send(runner, next(steps(100, first=16)))  # ids below 100: page 0 only
    assert await runner.log.flush(timeout_s=60)
    await runner.sweep()
    expected = await everything(runner)
    assert_same(await everything(await (await servers.make()).runner("policy")), expected)


async def test_a_stalled_redis_holds_back_durability_but_not_the_steps(servers: Servers, redis: EmbeddedRedis) -> None:
    engine = await servers.make(log_timeout_s=0.25)
    runner = await runner_of(engine)
    await feed(runner, 3)
    assert await runner.log.flush(timeout_s=60)
    assert redis.pid is not None
    os.kill(redis.pid, signal.SIGSTOP)
    try:
        await asyncio.wait_for(feed(runner, 40, first=4), 60)
        assert runner.durable_sequence("trainer") == 3
        assert runner.log.backlog == 40
    finally:
        os.kill(redis.pid, signal.SIGCONT)
    assert await runner.log.flush(timeout_s=60)
    assert runner.durable_sequence("trainer") == 43
    expected = await everything(runner)
    assert_same(await everything(await (await servers.make()).runner("policy")), expected)


async def test_a_redis_that_comes_back_after_a_long_outage_gets_the_tables_instead_of_the_log(
    servers: Servers, redis: EmbeddedRedis
) -> None:
    engine = await servers.make(log_timeout_s=0.25)
    runner = await runner_of(engine)
    await feed(runner, 3)
    assert await runner.log.flush(timeout_s=60)
    runner.log.backlogs = Backlogs(max_bytes=1, max_policy_bytes=1)  # the memory kept for the log is used up at once
    assert redis.pid is not None
    os.kill(redis.pid, signal.SIGSTOP)
    try:
        await asyncio.wait_for(feed(runner, 10, first=4), 60)
        while runner.log.tail.size:
            await asyncio.sleep(0.01)
    finally:
        os.kill(redis.pid, signal.SIGCONT)
    assert await runner.log.flush(timeout_s=60)
    expected = await everything(runner)
    assert_same(await everything(await (await servers.make()).runner("policy")), expected)


async def test_a_short_outage_does_not_write_the_tables_again_for_what_redis_has(
    servers: Servers, redis: EmbeddedRedis
) -> None:
    engine = await servers.make(log_timeout_s=0.25)
    runner = await runner_of(engine)
    await feed(runner, 20)
    assert await runner.log.flush(timeout_s=60)
    used = runner.log.tail.size
    runner.log.backlogs = Backlogs(max_bytes=used, max_policy_bytes=used)  # the log since the last sweep has used it up
    generation = runner.owner.generation
    assert redis.pid is not None
    os.kill(redis.pid, signal.SIGSTOP)
    try:
        await asyncio.wait_for(feed(runner, 5, first=21), 60)
        while runner.log.tail.base < 20:
            await asyncio.sleep(0.01)
        assert runner.log.backlog == 5
    finally:
        os.kill(redis.pid, signal.SIGCONT)
    assert await runner.log.flush(timeout_s=60)
    assert runner.owner.generation == generation
    expected = await everything(runner)
    assert_same(await everything(await (await servers.make()).runner("policy")), expected)


async def test_behind_answers_before_the_log_has_the_step(servers: Servers, redis: EmbeddedRedis) -> None:
    engine = await servers.make()
    runner = await runner_of(engine, durability=Durability.BEHIND)
    assert redis.pid is not None
    os.kill(redis.pid, signal.SIGSTOP)
    try:
        answer = await asyncio.wait_for(send(runner, next(steps(1000))), 60)
        assert (answer.outcome, runner.durable_sequence("trainer")) == (Outcome.APPLIED, 0)
    finally:
        os.kill(redis.pid, signal.SIGCONT)
    assert await runner.log.flush(timeout_s=60)
    assert runner.durable_sequence("trainer") == 1


@pytest.mark.parametrize("rule", ["ema_sign", "boltzmann"])
async def test_a_fork_starts_with_the_same_bits_and_goes_its_own_way(servers: Servers, rule: str) -> None:
    engine = await servers.make()
    source = await runner_of(engine, rule=rule)
    await feed(source, 10)
    snapshot = await everything(source)
    await fork(engine, source, spec("fork", rule=rule))
    forked = await engine.runner("fork")
    copied = await everything(forked)
    assert copied.columns == snapshot.columns
    assert copied.header.scalars == snapshot.header.scalars
    assert forked.policy.version == 0
    await feed(forked, 3)
    assert_same(await everything(source), snapshot)
    expected = await everything(forked)
    assert_same(await everything(await (await servers.make()).runner("fork")), expected)
    told = r"^policy\.name: 'fork' is the name of a policy that exists; use another name$"
    with pytest.raises(ServiceError, match=told) as caught:
        await fork(engine, source, spec("fork", rule=rule))
    assert caught.value.reason == "POLICY_EXISTS"


async def test_deletion_ends_streams_and_a_namesake_starts_afresh_under_a_higher_epoch(servers: Servers) -> None:
    engine, other = await servers.make(), await servers.make()
    runner = await runner_of(engine)
    session, _ = await runner.open("trainer")
    await feed(runner, 3)
    await engine.delete("policy")
    assert (await asyncio.wait_for(session.ended, 60)).reason == "POLICY_DELETED"
    for asked in (engine, other):
        with pytest.raises(ServiceError) as caught:
            await asked.runner("policy")
        assert caught.value.reason == "POLICY_NOT_FOUND"
    again = await runner_of(engine)
    assert (again.policy.version, again.policy.uid == runner.policy.uid) == (0, False)
    assert again.epoch > runner.epoch


async def test_a_full_queue_stops_streams_and_turns_unary_callers_away(servers: Servers) -> None:
    engine = await servers.make()
    runner = await runner_of(engine)
    held, release = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def hold(policy: Policy) -> None:
        loop.call_soon_threadsafe(held.set)
        asyncio.run_coroutine_threadsafe(release.wait(), loop).result(30)

    holding = asyncio.create_task(runner.read(hold))
    await held.wait()
    numbered = steps(runner.policy.spec.num_examples)
    futures = [await runner.submit(next(numbered))]
    while len(runner.queue):  # the first one is taken and waits for the device
        await asyncio.sleep(0)
    futures += [await runner.submit(next(numbered)) for _ in range(64)]
    with pytest.raises(ServiceError) as caught:
        runner.submit_now(next(steps(1000, trainer_id="unary")))
    assert (caught.value.reason, caught.value.retry_after_s) == ("QUEUE_FULL", 0.1)
    waiting = asyncio.create_task(runner.submit(next(numbered)))
    await asyncio.sleep(0)
    assert not waiting.done()
    release.set()
    futures.append(await asyncio.wait_for(waiting, 60))
    answers = await asyncio.gather(*futures)
    assert [answer.version for answer in answers] == list(range(1, 67))
    await holding


async def test_a_second_opening_ends_the_first_and_sees_all_it_sent(servers: Servers) -> None:
    engine = await servers.make()
    runner = await runner_of(engine)
    first, opening = await runner.open("trainer")
    assert opening.last_sequence == 0
    futures = [await runner.submit(step) for step in islice(steps(1000), 7)]
    second, opening = await runner.open("trainer")
    assert first.ended.result().reason == "TRAINER_REPLACED"
    assert not second.ended.done()
    assert opening.last_sequence == 7
    await asyncio.gather(*futures)


async def test_a_trainer_idle_for_a_day_is_forgotten(servers: Servers) -> None:
    now = 1e9
    engine = await servers.make(wall_clock=lambda: now)
    runner = await runner_of(engine)
    await feed(runner, 3)
    _, opening = await runner.open("trainer")
    assert (opening.last_sequence, runner.durable_sequence("trainer")) == (3, 3)
    now += 86_401
    _, opening = await runner.open("trainer")
    assert (opening.last_sequence, runner.durable_sequence("trainer")) == (0, 0)
    assert (await send(runner, next(steps(1000)))).outcome is Outcome.APPLIED


async def test_time_in_which_nobody_serves_the_policy_makes_no_trainer_idle(servers: Servers) -> None:
    now = 1e9
    first = await servers.make(wall_clock=lambda: now)
    runner = await runner_of(first)
    await send(runner, next(steps(1000, trainer_id="gone")))
    now += 80_000
    for step in islice(steps(1000), 3):
        await send(runner, step)
    assert await runner.log.flush(timeout_s=60)
    await first.close(draining(), flush_timeout_s=60)
    now += 10 * 86_400  # ten days without a server
    second = await servers.make(wall_clock=lambda: now)
    runner = await second.runner("policy")
    _, opening = await runner.open("trainer")
    assert opening.last_sequence == 3  # what it sends again is known
    assert (await send(runner, next(steps(1000)))).outcome is Outcome.DUPLICATE
    now += 80_000  # and so is what went before: "gone" has been idle for longer than a day by now
    assert runner.durable_sequence("gone") == 1
    await runner.open("somebody")
    assert set(runner.policy.trainers.known) == {"trainer"}
    assert runner.durable_sequence("gone") == 0


async def test_a_trainer_with_an_open_stream_is_not_forgotten_for_others(servers: Servers) -> None:
    now = 1e9
    engine = await servers.make(wall_clock=lambda: now)
    runner = await runner_of(engine)
    await runner.open("trainer")
    await feed(runner, 3)
    now += 200_000
    await runner.open("somebody")
    assert (await send(runner, next(steps(1000, first=4)))).outcome is Outcome.APPLIED


async def test_a_clock_that_jumps_changes_nothing(servers: Servers) -> None:
    jumps = iter([0.0, 3600.0, -7200.0, 3600.0, -3600.0] * 100)
    now = 1e9

    def jumping() -> float:
        nonlocal now
        now += next(jumps)
        return now

    steady, engine = await servers.make(), await servers.make(wall_clock=jumping)
    ends = []
    for name, made_by in (("steady", steady), ("jumping", engine)):
        runner = await runner_of(made_by, name=name)
        await runner.open("trainer")
        for first in range(1, 31, 5):
            await feed(runner, 5, first=first)
            _, opening = await runner.open("trainer")
            assert opening.last_sequence == first + 4  # never forgotten, never twice
        assert await runner.log.flush(timeout_s=60)
        ends.append((await everything(runner)).columns)
    assert ends[0] == ends[1]
    assert (await everything(await (await servers.make()).runner("jumping"))).columns == ends[1]


async def test_an_idle_policy_leaves_memory_and_comes_back_on_first_touch(servers: Servers) -> None:
    engine = await servers.make()
    runner = await runner_of(engine)
    await feed(runner, 5)
    expected = await everything(runner)
    session, _ = await runner.open("trainer")
    await engine.unload_idle(idle_s=0.0)
    assert engine.runners == [runner]  # a stream is open
    runner.close_session(session)
    await engine.unload_idle(idle_s=0.0)
    assert engine.runners == []
    assert_same(await everything(await engine.runner("policy")), expected)


async def test_the_mean_weight_is_one_after_a_takeover(servers: Servers) -> None:
    engine = await servers.make()
    await feed(await runner_of(engine, num_examples=PAGE + 1), 20)
    runner = await (await servers.make()).runner("policy")
    weights = await runner.read(lambda policy: policy.weights(None))
    assert abs(np.mean(weights, dtype=np.float64) - 1) < 1e-6
