"""`Patience` bounds each of many waits as asyncio.timeout does, under a clock that the test turns."""

import asyncio
from collections.abc import Iterator
from contextlib import suppress

import pytest

from equipoise_server.patience import Patience


class Clock:
    """Time of the running loop, which passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.timers = 0
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(loop, "time", lambda: self.now)
        call_at = loop.call_at

        def counted(*arguments: object, **options: object) -> object:
            self.timers += 1
            return call_at(*arguments, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(loop, "call_at", counted)

    async def passes(self, seconds: float) -> None:
        self.now += seconds
        for _ in range(5):
            await asyncio.sleep(0)


@pytest.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    return Clock(monkeypatch)


async def wait(patience: Patience, event: asyncio.Event) -> str:
    try:
        with patience:
            await event.wait()
    except TimeoutError:
        return "late"
    return "done"


async def test_a_wait_ends_when_its_own_time_is_up(clock: Clock) -> None:
    patience = Patience(10)
    for _ in range(3):  # each of them anew
        never = asyncio.create_task(wait(patience, asyncio.Event()))
        await clock.passes(0)
        await clock.passes(9.9)
        assert not never.done()
        await clock.passes(0.2)
        assert never.done()
        assert await never == "late"


async def test_a_wait_that_begins_late_has_all_of_its_time(clock: Clock) -> None:
    patience, event = Patience(10), asyncio.Event()
    event.set()
    assert await wait(patience, event) == "done"
    await clock.passes(6)
    second = asyncio.create_task(wait(patience, asyncio.Event()))
    await clock.passes(0)
    await clock.passes(6)  # the timer of the first one looks
    assert not second.done()
    await clock.passes(3.9)
    assert not second.done()
    await clock.passes(0.2)
    assert await second == "late"


async def test_many_waits_set_a_timer_seldom(clock: Clock) -> None:
    patience, event = Patience(10), asyncio.Event()
    event.set()
    for _ in range(1000):
        assert await wait(patience, event) == "done"
        await clock.passes(0.01)
    assert clock.timers <= 2


async def test_what_else_ends_a_wait_is_told_as_it_is(clock: Clock) -> None:
    patience = Patience(10)
    with pytest.raises(KeyError), patience:
        raise KeyError
    waiting = asyncio.create_task(wait(patience, asyncio.Event()))
    await clock.passes(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_a_task_that_is_cancelled_as_its_time_is_up_ends_cancelled(clock: Clock) -> None:
    patience = Patience(10)
    waiting = asyncio.create_task(wait(patience, asyncio.Event()))
    await clock.passes(0)
    clock.now = 10.0
    asyncio.get_running_loop().call_at(10.0, waiting.cancel)
    with suppress(asyncio.CancelledError):
        assert await waiting != "done"
    assert waiting.cancelled()
