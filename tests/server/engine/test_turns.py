"""Who gets the device when many want it."""

import asyncio
import threading
import time
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise_server.engine import Device
from equipoise_server.engine.turns import Turns


@settings(max_examples=50, deadline=None)
@given(
    costs=st.dictionaries(st.sampled_from("abcde"), st.floats(1e-4, 0.5), min_size=2),
    quantum_s=st.floats(1e-3, 0.1),
)
def test_shares_that_always_want_more_get_the_same_time(costs: dict[str, float], quantum_s: float) -> None:
    turns: Turns[str] = Turns(quantum_s)
    for share in costs:
        for _ in range(2):
            turns.add(share, share)
    used = dict.fromkeys(costs, 0.0)
    for _ in range(1000):
        share = turns.take()
        turns.add(share, share)
        turns.charge(share, costs[share])
        used[share] += costs[share]
        assert max(used.values()) - min(used.values()) <= 2 * (quantum_s + max(costs.values()))


def test_a_share_that_comes_now_and_then_waits_for_one_turn_of_each_other() -> None:
    turns: Turns[str] = Turns(0.005)
    for share in "abc":
        for _ in range(100):
            turns.add(share, share)
    for _ in range(50):
        turns.charge(turns.take(), 0.005)
        turns.add("rare", "rare")
        before = []
        while (taken := turns.take()) != "rare":
            before.append(taken)
            turns.charge(taken, 0.005)
        turns.charge("rare", 0.0001)
        assert max(Counter(before).values(), default=0) <= 1


def test_items_of_one_share_keep_their_order() -> None:
    turns: Turns[int] = Turns(0.005)
    for number in range(10):
        turns.add("one", number)
    taken = []
    for _ in range(10):
        taken.append(turns.take())
        turns.charge("one", 0.004)
    assert taken == list(range(10))
    with pytest.raises(IndexError):
        turns.take()


async def test_short_work_does_not_wait_for_long_work() -> None:
    device = Device(torch.device("cpu"))
    go = threading.Event()
    long = asyncio.create_task(device.queue("one").run(go.wait, long=True))
    assert await asyncio.wait_for(device.queue("other").run(lambda: "done"), 60) == "done"
    assert not long.done()
    go.set()
    await long
    device.close()


async def test_work_on_one_policy_is_never_done_twice_at_a_time_nor_out_of_order() -> None:
    """Whichever lanes it is for."""
    device = Device(torch.device("cpu"))
    queue = device.queue("one")
    done: list[int] = []
    inside = 0

    def work(number: int) -> None:
        nonlocal inside
        inside += 1
        assert inside == 1
        time.sleep(0.0005)
        done.append(number)
        inside -= 1

    def options(number: int) -> dict[str, bool]:
        return {"long": number % 3 == 0, "inline": number % 5 == 0}

    calls = [asyncio.create_task(queue.run(lambda n=n: work(n), **options(n))) for n in range(200)]  # type: ignore[misc]
    await asyncio.gather(*calls)
    assert done == list(range(200))
    device.close()


async def test_on_a_gpu_too_long_work_of_the_host_holds_up_no_steps() -> None:
    device = Device(torch.device("cuda"))  # it is not used
    go = threading.Event()
    reading = asyncio.create_task(device.host_queue("one").run(go.wait, long=True))
    assert await asyncio.wait_for(device.queue("other").run(lambda: "done", long=True), 60) == "done"
    assert not reading.done()
    go.set()
    await reading
    device.close()


async def test_policies_of_one_share_have_one_turn_together(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("equipoise_server.engine.device.perf_counter", lambda: now)
    device = Device(torch.device("cpu"), share=lambda policy: policy.partition("-")[0])
    go, order = threading.Event(), list[str]()
    holding = asyncio.create_task(device.queue("other").run(go.wait))
    await asyncio.sleep(0)

    def work(name: str) -> None:
        nonlocal now
        order.append(name)
        now += 0.006

    names = [f"many-{number}" for number in range(20)] + ["few-1"] * 5
    calls = [asyncio.create_task(device.queue(name).run(lambda n=name: work(n))) for name in names]  # type: ignore[misc]
    await asyncio.sleep(0)
    go.set()
    await asyncio.gather(holding, *calls)
    assert max(place for place, name in enumerate(order) if name == "few-1") < 12
    device.close()


async def test_work_that_was_given_is_done_before_the_device_closes() -> None:
    device = Device(torch.device("cpu"))
    queue, done = device.queue("one"), list[int]()
    for number in range(20):
        calls = asyncio.create_task(queue.run(lambda n=number: done.append(n), long=number % 2 == 0))  # type: ignore[misc]
        await asyncio.sleep(0)
    device.close()
    assert done == list(range(20))
    await calls
    with pytest.raises(RuntimeError, match="closed"):
        await queue.run(lambda: None)
