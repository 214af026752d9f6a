"""The sweep: writes changed pages to the store and trims the log to what they do not hold."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import aclosing

import numpy as np

from equipoise_server.engine.device import DeviceQueue
from equipoise_server.engine.log import LogWriter
from equipoise_server.engine.policy import Policy
from equipoise_server.store import Page, PageBatch, RedisStore, SweepVoid

CAPTURE_BYTES = 4 << 20
"""Bytes of pages copied in one device call: they wait together until the log has reached their version."""


async def sweep(
    policy: Policy,
    *,
    log: LogWriter,
    store: RedisStore,
    device: DeviceQueue,
    bytes_per_s: float,
    on_page: Callable[[], None],
) -> int:
    """Writes every page that is dirty now, then the header of now, then trims the log to now.

    The header comes last: until it is written, a restore starts from the old one, for which the log is still there,
    and skips for each page what it already holds. A page is written only after the log has reached its version, so
    that no page is ever ahead of the log. Clean pages are trusted to be in the store only while it has not gone back:
    neither behind the last sweep nor, as the store's record and the count of what was written tell, during this one.
    Calls `on_page` after every page.

    Returns the number of pages written. Raises StoreError (SweepVoid when the store changed behind it), and whatever
    the device raises; pages that are not known to be in the store stay dirty.
    """
    record, changes, owner = log.record, log.record.changes, log.record.owner

    def check(version: int = 0) -> None:
        if record.republishing or record.changes != changes or record.durable_version < version:
            raise SweepVoid(f"policy {owner.policy!r}: what the store holds has changed during a sweep")

    check()
    if await _has_lost_a_sweep(store, log):
        policy.stored_at[:] = -1
    header = await device.run(lambda: policy.header)
    dirty = np.flatnonzero(policy.dirty_pages)
    batch = PageBatch()
    for indices in _batches(dirty.tolist(), policy):
        captured = await device.run(lambda indices=indices: [policy.capture_page(i) for i in indices])  # type: ignore[misc]
        for index, (version, columns) in zip(indices, captured, strict=True):
            await log.wait_durable(version, changes=changes)
            check(version)
            await store.write_page(owner, index, Page(version=version, columns=columns), batch=batch)
            check()
            policy.stored_at[index] = version
            on_page()
            await asyncio.sleep(sum(map(len, columns.values())) / bytes_per_s)
    await log.wait_durable(header.version, changes=changes)
    check(header.version)
    await store.write_header(owner, header.to_fields(), version=header.version, batch=batch)
    check()
    await store.trim(owner, through_version=header.version)
    check()
    log.trimmed(header.version)
    return len(dirty)


def _batches(pages: list[int], policy: Policy) -> Iterator[list[int]]:
    page_bytes = -(-policy.state.nbytes // max(policy.state.num_pages, 1))
    size = max(1, CAPTURE_BYTES // max(page_bytes, 1))
    return (pages[start : start + size] for start in range(0, len(pages), size))


async def _has_lost_a_sweep(store: RedisStore, log: LogWriter) -> bool:
    """Whether the store's log still has entries that were trimmed: then the pages before them are the old ones too."""
    async with aclosing(store.read_log(log.record.owner, after=0)) as entries:
        async for entry in entries:
            return entry.version <= log.record.base
    return False
