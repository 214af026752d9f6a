"""The sweep: writes changed pages to the store and trims the log to what they do not hold."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np

from equipoise_server.engine.device import DeviceThread
from equipoise_server.engine.log import LogWriter
from equipoise_server.engine.policy import Policy
from equipoise_server.engine.snapshot import Facts
from equipoise_server.store import LogLost, Ownership, Page, RedisStore, StoreError


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepLimits:
    """When to sweep and how fast.

    Attributes:
        min_bytes: a log smaller than this is not swept.
        bytes_per_s: pages are written no faster than this, so that appends go first.
    """

    min_bytes: int
    bytes_per_s: float


CAPTURE_BYTES = 8 << 20
"""Bytes of pages copied in one device call: they wait together until the log has reached their version."""


async def sweep(
    policy: Policy,
    *,
    log: LogWriter,
    store: RedisStore,
    owner: Ownership,
    device: DeviceThread,
    bytes_per_s: float,
    on_page: Callable[[], None],
) -> int:
    """Writes every page that is dirty now, then the facts of now, then trims the log to now.

    The facts come last: until they are written, a restore starts from the old ones, for which the log is still there,
    and skips for each page what it already holds. A page is written only after the log has reached its version, so
    that no page is ever ahead of the log. Clean pages are trusted to be in the store only while it has not gone back:
    neither behind the last sweep nor, as the log writer notices, during this one. Calls `on_page` after every page.

    Returns the number of pages written. Raises StoreError; the pages not written are dirty again.
    """
    rollbacks = log.rollbacks
    if await _has_lost_a_sweep(store, owner, log):
        policy.dirty_pages[:] = True
    facts = await device.run(lambda: Facts.of(policy))
    dirty = np.flatnonzero(policy.dirty_pages).tolist()
    unwritten = set(dirty)
    try:
        for indices in _batches(dirty, policy):
            captured = await device.run(lambda indices=indices: [policy.capture_page(i) for i in indices])  # type: ignore[misc]
            for index, (version, columns) in zip(indices, captured, strict=True):
                await log.wait_durable(version)
                await store.write_page(owner, index, Page(version=version, columns=columns))
                unwritten.discard(index)
                on_page()
                await asyncio.sleep(sum(map(len, columns.values())) / bytes_per_s)
        await log.wait_durable(facts.progress.version)
        if log.rollbacks != rollbacks:
            raise LogLost(owner.policy, last_version=log.durable_version)
        await store.write_progress(owner, facts.to_fields())
        await store.trim(owner, through_version=facts.progress.version)
    except (StoreError, asyncio.CancelledError):
        policy.dirty_pages[list(unwritten)] = True
        raise
    log.trimmed(facts.progress.version)
    return len(dirty)


def _batches(pages: list[int], policy: Policy) -> Iterator[list[int]]:
    page_bytes = -(-policy.state.nbytes // max(policy.state.num_pages, 1))
    size = max(1, CAPTURE_BYTES // max(page_bytes, 1))
    return (pages[start : start + size] for start in range(0, len(pages), size))


async def _has_lost_a_sweep(store: RedisStore, owner: Ownership, log: LogWriter) -> bool:
    """Whether the store's log still has entries that were trimmed: then the pages before them are the old ones too."""
    trimmed_through = log.tail.base
    async with aclosing(store.read_log(owner, after=0)) as entries:
        async for entry in entries:
            return entry.version <= trimmed_through
    return False
