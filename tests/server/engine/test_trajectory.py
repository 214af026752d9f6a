"""Rule `trajectory` in service on a real Redis: pages of whole rows, a log no longer than a policy epoch."""

import asyncio
import itertools
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from equipoise_server.engine import (
    Durability,
    Engine,
    Kind,
    Outcome,
    PolicyRunner,
    PolicySpec,
    Step,
    tables,
)
from equipoise_server.errors import ServiceError
from equipoise_server.rules import aggregate, build
from equipoise_server.store import EmbeddedRedis, RedisStore
from tests.server.engine.conftest import Servers
from tests.server.engine.runs import apply, everything, fork, replay, restore, send
from tests.server.engine.test_engine import send_until_refused
from tests.server.engine.test_policy import fresh, run, same_bits

ROWS, NUM_EXAMPLES, PAGE_ROWS = 7, 30_000, 2
SETTINGS = {"learning_rate": 1e-5, "policy_epochs": 3.0}


def spec(name: str = "policy", *, rows: int = ROWS, num_examples: int = NUM_EXAMPLES) -> PolicySpec:
    settings = dict(build("trajectory", SETTINGS | {"rows": rows}).settings)
    return PolicySpec(
        name=name,
        num_examples=num_examples,
        rule="trajectory",
        settings=settings,
        durability=Durability.LOGGED,
        reference_nats=None,
    )


def steps(of: PolicySpec, *, trainer_id: str = "trainer") -> Iterator[Step]:
    """An endless run of one trainer: backward through the rows, policy epoch after policy epoch."""
    rows = int(of.settings["rows"])
    for sequence in itertools.count(1):
        row = rows - 1 - (sequence - 1) % rows
        given = np.random.default_rng(sequence).normal(size=of.num_examples).astype(np.float32)
        yield Step(
            kind=Kind.STEP,
            trainer_id=trainer_id,
            sequence=sequence,
            training_step=row,
            statistics=aggregate(contributions=given, trajectory_row=row),
            wants_weights=False,
            num_rows=of.num_examples,
        )


async def runner_of(engine: Engine, of: PolicySpec | None = None) -> PolicyRunner:
    of = of or spec()
    await engine.create(of)
    return await engine.runner(of.name)


async def feed(runner: PolicyRunner, count: int, *, first: int = 1) -> None:
    """`count` steps, all in flight at once."""
    given = islice(steps(runner.policy.spec), first - 1, first - 1 + count)
    answers = await asyncio.gather(*[await runner.submit(step) for step in given])
    assert [answer.outcome for answer in answers] == [Outcome.APPLIED] * count
    assert [answer.version for answer in answers] == list(range(first, first + count))


async def assert_taken_over(servers: Servers, runner: PolicyRunner) -> None:
    """Another server that takes the policy over has the same bits."""
    expected = await everything(runner)
    status = runner.policy.status()
    after = await (await servers.make()).runner(runner.spec_name)
    taken = await everything(after)
    assert taken == expected
    assert after.policy.status() == status


def test_the_log_replays_to_the_same_bits() -> None:
    of = spec()
    live, replayed = fresh(of), fresh(of)
    for entry in run(live, list(islice(steps(of), 20))):
        replay(replayed, entry)
    assert same_bits(live, replayed)
    assert replayed.status() == live.status()
    np.testing.assert_array_equal(live.weights(None), replayed.weights(None))


def test_pages_captured_at_different_versions_replay_to_the_same_bits() -> None:
    of = spec()
    live, restored = fresh(of), fresh(of)
    given = list(islice(steps(of), 18))
    entries = run(live, given[:4])
    assert np.flatnonzero(live.dirty_pages).tolist() == [1, 2, 3]  # rows 6, 5, 4 and 3
    captured = {index: live.capture_page(index) for index in (0, 3)}
    entries += run(live, given[4:9])
    captured[2] = live.capture_page(2)  # page 1 was never captured
    entries += run(live, given[9:])
    assert [len(columns["weight"]) for _, columns in captured.values()] == [
        8 * NUM_EXAMPLES,
        4 * NUM_EXAMPLES,
        8 * NUM_EXAMPLES,
    ]
    for index, (_, columns) in captured.items():
        tables.load_page(restored.state, index, columns)
    restore(restored, restored.header, {index: version for index, (version, _) in captured.items()})
    for entry in entries:
        replay(restored, entry)
    assert same_bits(live, restored)
    assert restored.status() == live.status()


def test_a_duplicate_is_answered_with_its_row_of_now() -> None:
    of = spec(rows=2, num_examples=50)
    policy = fresh(of)
    first, second, third = islice(steps(of), 3)
    assert (first.training_step, second.training_step, third.training_step) == (1, 0, 1)
    run(policy, [first, second, third])
    answer, entry = apply(policy, replace(first, wants_weights=True), now=0.0)
    assert (answer.outcome, entry) == (Outcome.DUPLICATE, None)
    assert answer.weights is not None
    np.testing.assert_array_equal(answer.weights, policy.rule.trajectory_weights(policy.state, slice(1, 2), None)[0])
    assert policy.state.columns["updates"].tolist() == [1, 2]


async def test_a_second_server_takes_over_bit_for_bit_and_the_first_is_fenced(servers: Servers) -> None:
    before = await runner_of(await servers.make())
    await feed(before, 10)
    await assert_taken_over(servers, before)
    with pytest.raises(ServiceError) as caught:
        await send_until_refused(before, steps(before.policy.spec, trainer_id="late"))
    assert caught.value.reason == "FENCED"


async def test_a_sweep_writes_whole_rows_and_loses_nothing(servers: Servers, redis: EmbeddedRedis) -> None:
    runner = await runner_of(await servers.make())
    await feed(runner, 5)
    await asyncio.gather(runner.sweep(), feed(runner, 6, first=6))
    await feed(runner, 2, first=12)
    await runner.sweep()
    await send(runner, next(islice(steps(runner.policy.spec), 13, None)))  # row 0: page 0 alone
    assert np.flatnonzero(runner.policy.dirty_pages).tolist() == [0]
    await runner.sweep()
    store = RedisStore.connect(redis.url)
    pages = [await store.read_page("policy", index) for index in range(5)]
    assert pages[4] is None
    assert pages[0] is not None
    assert pages[0].version == 14
    assert all(page.version <= 13 for page in pages[1:4] if page)
    assert [len(page.columns["weight"]) // (4 * NUM_EXAMPLES) for page in pages if page] == [2, 2, 2, 1]
    assert (await store.log_state("policy")).entries == 0
    await store.close()
    await assert_taken_over(servers, runner)


async def test_the_log_never_holds_more_than_a_policy_epoch(servers: Servers, redis: EmbeddedRedis) -> None:
    """Two and a half policy epochs, faster than pages may be written; no setting asks for the sweeps but the rule."""
    of = spec(rows=512, num_examples=4096)
    slow = float(1 << 23)
    runner = await runner_of(await servers.make(sweep_bytes_per_s=slow), of)
    store = RedisStore.connect(redis.url)
    longest, given = 0, steps(of)
    for _ in range(40):
        answers = [await runner.submit(step) for step in islice(given, 32)]
        await asyncio.gather(*answers)
        longest = max(longest, (await store.log_state("policy")).entries)
    assert 64 <= longest <= 512
    assert await runner.log.flush(timeout_s=60)
    await store.close()
    await assert_taken_over(servers, runner)


async def test_a_sweep_that_does_not_get_on_stops_no_step(servers: Servers) -> None:
    of = spec(rows=300, num_examples=4096)
    stuck = 1.0  # after its first page it waits for days
    runner = await runner_of(await servers.make(sweep_bytes_per_s=stuck, log_timeout_s=0.25), of)
    given = steps(of)
    while runner.log.tail.size <= 4 << 20:  # four times what the rule wants it to have
        await asyncio.wait_for(asyncio.gather(*[await runner.submit(step) for step in islice(given, 32)]), 60)
    assert await runner.log.flush(timeout_s=60)
    await assert_taken_over(servers, runner)


async def test_a_flushed_redis_gets_every_row_back_from_memory(servers: Servers, redis: EmbeddedRedis) -> None:
    runner = await runner_of(await servers.make())
    await feed(runner, 9)
    await runner.sweep()
    store = RedisStore.connect(redis.url)
    await store._commands.run("flush", "FLUSHALL")
    await feed(runner, 8, first=10)
    assert await runner.log.flush(timeout_s=60)
    await feed(runner, 3, first=18)
    assert await runner.log.flush(timeout_s=60)
    await store.close()
    await assert_taken_over(servers, runner)


async def test_a_fork_has_the_same_rows_and_step_sizes_and_goes_its_own_way(servers: Servers) -> None:
    engine = await servers.make()
    source = await runner_of(engine)
    await feed(source, 10)
    snapshot = await everything(source)
    await fork(engine, source, spec("fork"))
    forked = await engine.runner("fork")
    assert (await everything(forked)).columns == snapshot.columns
    await feed(forked, 5)
    assert (await everything(source)).columns == snapshot.columns
    await assert_taken_over(servers, forked)
