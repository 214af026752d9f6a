"""The log writer: brings a policy's steps into the store in order, and tells when they are there."""

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from equipoise_server.engine.telemetry import Telemetry
from equipoise_server.store import (
    MAX_APPEND_BYTES,
    Fenced,
    LogEntry,
    LogLost,
    Ownership,
    RedisStore,
    StoreError,
    entry_bytes,
)

FIRST_BACKOFF_S = 0.05
MAX_BACKOFF_S = 1.0


@dataclass(slots=True)
class Waiter:
    """An answer that waits for a version to be durable, until its deadline (loop time, seconds)."""

    version: int
    deadline: float
    release: Callable[[], None]


class LogTail:
    """Log entries since the last sweep, so that a store that fell behind can be brought up again.

    Attributes:
        base: version before the first entry.
        size: bytes of the entries.
    """

    def __init__(self, base: int) -> None:
        self.base = base
        self.size = 0
        self._entries: deque[tuple[LogEntry, int]] = deque()

    @property
    def last_version(self) -> int:
        """Version of the newest entry, or the base."""
        return self.base + len(self._entries)

    def add(self, entry: LogEntry) -> None:
        """Adds the entry of the next version."""
        assert entry.version == self.last_version + 1
        self._entries.append((entry, entry_bytes(entry)))
        self.size += self._entries[-1][1]

    def after(self, version: int, *, max_bytes: int) -> list[LogEntry]:
        """The entries behind `version`, at least one if there is one, together at most `max_bytes`."""
        taken: list[LogEntry] = []
        size = 0
        for index in range(version - self.base, len(self._entries)):
            entry, entry_size = self._entries[index]
            size += entry_size
            if taken and size > max_bytes:
                break
            taken.append(entry)
        return taken

    def forget(self, through_version: int) -> None:
        """Drops the entries up to a version."""
        while self._entries and self.base < through_version:
            self.size -= self._entries.popleft()[1]
            self.base += 1
        self.base = max(self.base, through_version)


class LogWriter:
    """Appends entries to the store's log, one append in flight, whatever has gathered in each.

    A store that does not answer delays each waiting answer by `log_timeout_s` at most, and only until the first of
    them has run out: from then on answers are not held up until the store has caught up.
    """

    def __init__(
        self,
        store: RedisStore,
        owner: Ownership,
        *,
        tail: LogTail,
        log_timeout_s: float,
        max_backlog_bytes: int,
        telemetry: Telemetry,
        republish: Callable[[], Awaitable[tuple[Ownership, int]]],
        on_rollback: Callable[[], None],
    ) -> None:
        self.owner = owner
        """The right to write; renewed when everything had to be written again."""
        self.tail = tail
        self.durable_version = tail.last_version
        """Newest version that is in the store."""
        self.appended_bytes = tail.size
        """Bytes in the store's log since the last trim."""
        self.failing = False
        """Whether the store did not take the last append."""
        self.rollbacks = 0
        """How often the store was found to have lost entries."""
        self._store = store
        self._log_timeout_s = log_timeout_s
        self.max_backlog_bytes = max_backlog_bytes
        self._telemetry = telemetry
        self._republish = republish
        self._on_rollback = on_rollback
        self._waiters: deque[Waiter] = deque()
        self._watchers: list[tuple[int, asyncio.Future[None]]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._longer_than = 0
        self._long = asyncio.Event()
        self._lagging = False
        self._overrun = False

    @property
    def backlog(self) -> int:
        """Versions that are not in the store yet."""
        return self.tail.last_version - self.durable_version

    def add(self, entries: list[LogEntry]) -> None:
        """Queues entries for the log."""
        for entry in entries:
            self.tail.add(entry)
        self._wake.set()

    def when_durable(self, version: int, release: Callable[[], None]) -> None:
        """Calls `release` once the version is in the store, or its time is up."""
        if version <= self.durable_version or self._lagging:
            release()
            return
        self._waiters.append(Waiter(version, self._loop.time() + self._log_timeout_s, release))
        if self._timer is None:
            self._timer = self._loop.call_at(self._waiters[0].deadline, self._expire)

    async def wait_durable(self, version: int) -> None:
        """Returns once the version is in the store, however long it takes."""
        while self.durable_version < version:
            reached: asyncio.Future[None] = self._loop.create_future()
            self._watchers.append((version, reached))
            await reached

    async def wait_longer_than(self, size: int) -> None:
        """Returns once the store's log has more than `size` bytes since the last trim; for one caller at a time."""
        self._longer_than = size
        while self.appended_bytes <= size:
            self._long.clear()
            await self._long.wait()

    async def run(self) -> None:
        """Writes until cancelled. Raises Fenced when another server owns the policy."""
        backoff_s = FIRST_BACKOFF_S
        while True:
            try:
                await self._write_backlog()
                backoff_s = FIRST_BACKOFF_S
                self._wake.clear()
                if not self.backlog:
                    await self._wake.wait()
            except LogLost as lost:
                self._rewind(lost.last_version)
            except Fenced:
                self._telemetry.fenced()
                raise
            except StoreError:
                self.failing = True
                self._check_overrun()
                await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
                backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    async def flush(self, *, timeout_s: float) -> bool:
        """Waits until everything is in the store; False when the time is up before."""
        try:
            async with asyncio.timeout(timeout_s):
                await self.wait_durable(self.tail.last_version)
        except TimeoutError:
            return False
        return True

    def trimmed(self, version: int) -> None:
        """The store's log was trimmed through a version."""
        self.tail.forget(version)
        self.appended_bytes = self.tail.size

    async def _write_backlog(self) -> None:
        if self._overrun:
            self.owner, version = await self._republish()
            self.tail.forget(version)
            self.appended_bytes = 0
            self._overrun = False
            self._advance(version)
        while batch := self.tail.after(self.durable_version, max_bytes=MAX_APPEND_BYTES):
            await self._store.append(self.owner, batch)
            self.failing = False
            self.appended_bytes += sum(map(entry_bytes, batch))
            if self.appended_bytes > self._longer_than:
                self._long.set()
            self._advance(batch[-1].version)
            self._telemetry.persisted()

    def _advance(self, version: int) -> None:
        self.durable_version = version
        if self._lagging and not self.backlog:
            self._lagging = False
        while self._waiters and self._waiters[0].version <= version:
            self._waiters.popleft().release()
        for watcher in [watcher for watcher in self._watchers if watcher[0] <= version]:
            self._watchers.remove(watcher)
            if not watcher[1].done():
                watcher[1].set_result(None)

    def _rewind(self, last_version: int | None) -> None:
        """The store has lost the newest entries: write them again from the tail, or everything from the tables."""
        self.rollbacks += 1
        self._on_rollback()
        if last_version is None or last_version < self.tail.base:
            self._overrun = True
        else:
            self.durable_version = last_version

    def _check_overrun(self) -> None:
        """Bounds the memory of a long outage: first by what the store has, then by what the tables hold too."""
        if self.tail.size > self.max_backlog_bytes:
            self.tail.forget(self.durable_version)
        if self.tail.size > self.max_backlog_bytes:
            self._overrun = True
            self.tail.forget(self.tail.last_version)

    def _expire(self) -> None:
        self._timer = None
        if not self._waiters:
            return
        if self._waiters[0].deadline <= self._loop.time():
            self._lagging = True
            while self._waiters:
                self._waiters.popleft().release()
        else:
            self._timer = self._loop.call_at(self._waiters[0].deadline, self._expire)
