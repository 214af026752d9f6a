"""Snapshots: a policy at one version, while steps go on; and what is drawn from one."""

import asyncio
import threading
from contextlib import AsyncExitStack, suppress
from itertools import islice

import numpy as np
import pytest
import torch

from equipoise_server.engine import Device, Engine, Kind, Policy, PolicyRunner, Snapshot, Step
from equipoise_server.engine.sampling import draw
from equipoise_server.engine.snapshots import MAX_SNAPSHOTS
from equipoise_server.errors import ServiceError
from equipoise_server.rules import Slices, build, exhaust, names
from tests.server.engine.conftest import Servers
from tests.server.engine.runs import PAGE, apply, spec, steps, whole
from tests.server.engine.test_policy import fresh
from tests.server.engine.test_trajectory import spec as trajectory_spec
from tests.server.engine.test_trajectory import steps as trajectory_steps

NUM_EXAMPLES = 3 * PAGE + 100


def columns_of(snapshot: Snapshot) -> dict[str, bytes]:
    pages = [snapshot.page(index, version=0).columns for index in range(snapshot.num_pages)]
    return {name: b"".join(page[name] for page in pages) for name in (pages[0] if pages else ())}


def run_of(rule: str) -> tuple[Policy, "list[Step]"]:
    if rule == "trajectory":
        of = trajectory_spec()
        return fresh(of), list(islice(trajectory_steps(of), 12))
    of = spec(rule=rule, num_examples=NUM_EXAMPLES)
    return fresh(of), list(islice(steps(NUM_EXAMPLES, batch=3), 12))


@pytest.mark.parametrize("rule", names())
def test_a_snapshot_stays_what_it_was_while_steps_go_on(rule: str) -> None:
    policy, given = run_of(rule)
    taken = []
    for position, step in enumerate(given):
        if position % 3 == 0:
            taken.append((policy.snapshot(), whole(policy), policy.weights(None)))
        apply(policy, step, now=0.0)
    assert len({snapshot.header.version for snapshot, _, _ in taken}) == 4
    for snapshot, expected, weights in taken:
        assert columns_of(snapshot) == expected.columns
        assert snapshot.header == expected.header
        exhaust(snapshot.prepare_weights())
        starts = range(0, policy.spec.num_examples, PAGE)
        read = np.concatenate([snapshot.weights(start) for start in starts])
        np.testing.assert_allclose(read, weights, rtol=1e-6 if rule == "trajectory" else 0)
        policy.close_snapshot(snapshot)
    assert not policy.has_snapshots


def test_only_pages_that_change_are_copied_and_none_that_was_read_for_good() -> None:
    policy = fresh(spec(num_examples=NUM_EXAMPLES))
    snapshot = policy.snapshot()
    snapshot.release(0)
    first, second = (step for step in islice(steps(2 * PAGE, batch=50), 2))
    apply(policy, first, now=0.0)  # pages 0 and 1
    assert sorted(snapshot._copies) == [1]
    copy = snapshot.columns(1)
    apply(policy, second, now=0.0)
    assert snapshot.columns(1) is copy
    policy.close_snapshot(snapshot)
    apply(policy, next(steps(NUM_EXAMPLES, first=3)), now=0.0)
    assert sorted(snapshot._copies) == [1]


def trained(num_examples: int = NUM_EXAMPLES, rule: str = "ema_relu") -> Policy:
    policy = fresh(spec(rule=rule, num_examples=num_examples))
    for step in islice(steps(num_examples, batch=20_000), 5):
        apply(policy, step, now=0.0)
    return policy


def drawn(policy: Policy, count: int, *, with_replacement: bool, seed: int) -> np.ndarray:
    snapshot = policy.snapshot()
    options = {"num_examples": policy.spec.num_examples, "with_replacement": with_replacement, "seed": seed}
    return exhaust(draw(snapshot, count, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(3))
def test_drawing_without_replacement_is_efraimidis_and_spirakis_over_the_whole_table(seed: int) -> None:
    policy = trained()
    weights = policy.weights(None).astype(np.float64)
    keys = -np.random.Generator(np.random.PCG64(seed)).exponential(size=NUM_EXAMPLES) / weights
    for count in (1, 50, 100_000, NUM_EXAMPLES):
        expected = np.argsort(-keys, kind="stable")[:count]
        np.testing.assert_array_equal(drawn(policy, count, with_replacement=False, seed=seed), expected)


@pytest.mark.parametrize("seed", range(3))
def test_drawing_with_replacement_is_inversion_over_the_whole_table(seed: int) -> None:
    policy = trained()
    ends = np.cumsum(policy.weights(None), dtype=np.float64)
    points = np.random.Generator(np.random.PCG64(seed)).random(50_000) * ends[-1]
    expected = np.searchsorted(ends, points, side="right")
    found = drawn(policy, 50_000, with_replacement=True, seed=seed)
    far = np.abs(found - expected) > 1  # page sums are added in another order: neighbours may change places
    assert not far.any()
    assert (found != expected).sum() <= 2


def test_weights_of_zero_are_never_drawn_and_too_few_of_others_is_an_error() -> None:
    of = spec(rule="projected_gradient", num_examples=4 * PAGE)
    policy = fresh(of)
    gone = np.concatenate([np.arange(PAGE), np.arange(2 * PAGE, 4 * PAGE)])
    policy.state.columns["raw"].fill_(build("projected_gradient", {}).raw_range[1] // 4)  # type: ignore[attr-defined]
    policy.state.columns["raw"][torch.from_numpy(gone)] = 0
    exhaust(policy.rule.restore_slices(policy.state))
    for with_replacement in (True, False):
        found = drawn(policy, 5000, with_replacement=with_replacement, seed=7)
        assert ((found >= PAGE) & (found < 2 * PAGE)).all()
    with pytest.raises(ServiceError, match="only 65536 examples have a weight above 0"):
        drawn(policy, PAGE + 1, with_replacement=False, seed=7)


async def test_long_work_lets_other_calls_have_the_device_between_its_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("equipoise_server.engine.device.perf_counter", lambda: now)
    device = Device(torch.device("cpu"))
    go, order = threading.Event(), list[str]()

    def long(slices: int) -> Slices[str]:
        nonlocal now
        for _ in range(slices):
            order.append("slice")
            now += 0.006  # longer than one piece may be
            yield
        return "done"

    holding = asyncio.create_task(device.queue("third").run(go.wait))
    await asyncio.sleep(0)
    working = asyncio.create_task(device.queue("one").run_slices(long(20)))
    calls = [asyncio.create_task(device.queue("other").run(lambda: order.append("call"))) for _ in range(5)]
    await asyncio.sleep(0)
    go.set()
    assert await working == "done"
    await asyncio.gather(holding, *calls)
    last = len(order) - 1 - order[::-1].index("call")
    assert order.count("slice") == 20
    assert 1 <= order[:last].count("slice") <= 6
    device.close()


async def test_a_caller_that_leaves_ends_its_long_work() -> None:
    device = Device(torch.device("cpu"))
    closed = asyncio.Event()
    loop = asyncio.get_running_loop()

    def endless() -> Slices[None]:
        try:
            while True:
                yield
        finally:
            loop.call_soon_threadsafe(closed.set)

    working = asyncio.create_task(device.queue("one").run_slices(endless()))
    await asyncio.sleep(0.02)
    working.cancel()
    await asyncio.wait_for(closed.wait(), 60)
    device.close()


def test_reads_do_not_make_snapshots_copy() -> None:
    policy = fresh(spec(num_examples=NUM_EXAMPLES))
    snapshot = policy.snapshot()
    apply(policy, Step(kind=Kind.READ, weights_for=np.arange(5)), now=0.0)
    assert not snapshot._copies


async def test_a_caller_who_leaves_leaves_no_snapshot(servers: Servers) -> None:
    engine = await servers.make()
    await engine.create(spec())
    runner = await engine.runner("policy")
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        release.wait(30)

    holding = asyncio.create_task(runner._device.run(hold))
    await asyncio.to_thread(held.wait, 30)

    async def take() -> None:
        async with runner.snapshot():
            raise AssertionError("it was cancelled before")

    taking = [asyncio.create_task(take()) for _ in range(3)]
    await asyncio.sleep(0.05)
    for task in taking:
        task.cancel()
    await asyncio.wait(taking)
    release.set()
    await holding
    await runner.read(lambda policy: None)
    await asyncio.sleep(0)
    assert not runner.policy.has_snapshots


async def loaded(engine: Engine) -> PolicyRunner:
    """The policy, however long it is being loaded."""
    while True:
        with suppress(ServiceError):
            return await engine.runner("policy")


async def test_too_many_readers_of_whole_policies_are_turned_away(servers: Servers) -> None:
    engine = await servers.make(load_wait_s=0.1)
    await engine.create(spec())
    runner = await loaded(engine)
    async with AsyncExitStack() as stack:
        for _ in range(MAX_SNAPSHOTS):
            await stack.enter_async_context(runner.snapshot())
        with pytest.raises(ServiceError) as caught:
            async with runner.snapshot():
                pass
        assert (caught.value.reason, caught.value.retry_after_s) == ("TOO_MANY_READERS", 1.0)
    async with runner.snapshot():
        pass


async def test_who_reads_a_policy_that_is_deleted_is_told_so(servers: Servers) -> None:
    engine = await servers.make()
    await engine.create(spec())
    runner = await engine.runner("policy")
    async with runner.snapshot() as snapshot:
        await engine.delete("policy")
        drawing = draw(snapshot, 5, num_examples=5, with_replacement=True, seed=1)
        with pytest.raises(ServiceError) as caught:
            await runner.read_slices(drawing)
        assert caught.value.reason == "POLICY_DELETED"
        with pytest.raises(ServiceError):
            snapshot.page(0, version=0)
