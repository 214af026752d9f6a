"""Bytes of requests under way: bounded for each share and in all, and nobody is kept out."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable

from equipoise_server.servicer.in_flight import InFlightBytes

MAX_BYTES, MAX_SHARE_BYTES = 1000, 400


def in_flight() -> InFlightBytes:
    return InFlightBytes(max_bytes=MAX_BYTES, max_share_bytes=MAX_SHARE_BYTES, share=lambda policy: policy[0])


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_random_requests_never_exceed_the_bounds_keep_their_order_and_all_get_through() -> None:
    chance, gate = random.Random(7), in_flight()
    used: Counter[str] = Counter()
    largest: Counter[str] = Counter()
    came: dict[str, list[int]] = {share: [] for share in "abc"}

    async def request(share: str, number: int, size: int) -> None:
        give_back = await gate.take(f"{share}-{number}", size)
        came[share].append(number)
        used[share] += size
        largest[share] = max(largest[share], size)
        try:
            assert used[share] <= max(MAX_SHARE_BYTES, size)
            alone = sum(used[other] for other in used if used[other] <= largest[other])
            assert used.total() <= MAX_BYTES + alone
            await asyncio.sleep(chance.random() / 1000)
        finally:
            used[share] -= size
            give_back()

    calls = []
    for number in range(300):
        for share in "abc":
            size = chance.choice((1, 50, 200, 399, 1500))
            calls.append(asyncio.create_task(request(share, number, size)))
            if chance.random() < 0.3:
                await asyncio.sleep(0)
    leaving = chance.sample(calls, 100)
    await settled()
    for call in leaving:
        call.cancel()
    async with asyncio.timeout(60):
        ends = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(end) for end in ends} == {type(None), asyncio.CancelledError}
    for numbers in came.values():
        assert numbers == sorted(numbers)
    give_back = await asyncio.wait_for(gate.take("d", MAX_BYTES), 60)  # nothing was lost on the way
    give_back()


async def test_a_share_that_has_nothing_under_way_is_let_in_whatever_the_others_do() -> None:
    gate = in_flight()
    held = [await gate.take(f"{share}-1", 399) for share in "abc"]
    waiting = asyncio.create_task(gate.take("a-2", 399))
    await asyncio.wait_for(gate.take("z-1", 5000), 60)
    await settled()
    assert not waiting.done()
    held[0]()
    await asyncio.wait_for(waiting, 60)


async def test_who_leaves_the_line_does_not_hold_up_those_behind() -> None:
    gate = in_flight()
    release: Callable[[], None] = await gate.take("a", 300)
    first, second = (asyncio.create_task(gate.take("a", size)) for size in (200, 100))
    await settled()
    assert not first.done()
    assert not second.done()
    first.cancel()
    await asyncio.wait_for(second, 60)
    release()
