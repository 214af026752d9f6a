"""Who waits is woken when what he waits for holds, and not before."""

import asyncio
import threading

from equipoise.waiters import AioWaiters, Waiters

SOON_S = 0.01
"""A wait that is to run out."""
PATIENCE_S = 60.0


class Asked:
    """A condition that counts how often it was asked."""

    def __init__(self) -> None:
        self.holds = False
        self.count = 0
        self.first = threading.Event()

    def __call__(self) -> bool:
        self.count += 1
        self.first.set()
        return self.holds


def test_a_thread_sleeps_through_changes_that_are_not_its_own() -> None:
    lock = threading.Lock()
    waiters = Waiters(lock)
    asked = Asked()
    woken: list[bool] = []

    def wait() -> None:
        with lock:
            woken.append(waiters.wait_for(asked, PATIENCE_S))

    thread = threading.Thread(target=wait)
    thread.start()
    assert asked.first.wait(PATIENCE_S)
    for _ in range(3):
        with lock:
            waiters.notify()
    with lock:
        assert asked.count == 4  # its own look, and three of those who notified
        asked.holds = True
        waiters.notify()
    thread.join(PATIENCE_S)
    assert woken == [True]
    assert asked.count == 6  # and one of its own again, once woken
    assert not waiters._waiting


def test_a_thread_whose_time_is_up_leaves_nothing_behind() -> None:
    lock = threading.Lock()
    waiters = Waiters(lock)
    with lock:
        assert not waiters.wait_for(lambda: False, SOON_S)
        assert not waiters.wait_for(lambda: False, 0.0)
        assert waiters.wait_for(lambda: True, 0.0)
        assert lock.locked()
    assert not waiters._waiting


def test_a_thread_that_is_woken_too_late_waits_on() -> None:
    lock = threading.Lock()
    waiters = Waiters(lock)
    asked = Asked()
    woken: list[bool] = []

    def wait() -> None:
        with lock:
            woken.append(waiters.wait_for(asked))

    thread = threading.Thread(target=wait)
    thread.start()
    assert asked.first.wait(PATIENCE_S)
    with lock:
        asked.holds = True
        waiters.notify()
        asked.holds = False  # before the thread gets the lock
        asked.first.clear()
    assert asked.first.wait(PATIENCE_S)
    with lock:
        assert not woken
        asked.holds = True
        waiters.notify()
    thread.join(PATIENCE_S)
    assert woken == [True]


async def test_a_task_sleeps_through_changes_that_are_not_its_own() -> None:
    waiters = AioWaiters()
    asked = Asked()
    task = asyncio.create_task(waiters.wait_for(asked, PATIENCE_S))
    await asyncio.sleep(0)
    for _ in range(3):
        waiters.notify()
        await asyncio.sleep(0)
    assert asked.count == 4
    asked.holds = True
    waiters.notify()
    assert await task
    assert not waiters._waiting


async def test_a_task_whose_time_is_up_or_that_is_cancelled_leaves_nothing_behind() -> None:
    waiters = AioWaiters()
    assert not await waiters.wait_for(lambda: False, SOON_S)
    assert await waiters.wait_for(lambda: True, 0.0)
    task = asyncio.create_task(waiters.wait_for(lambda: False))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert not waiters._waiting
