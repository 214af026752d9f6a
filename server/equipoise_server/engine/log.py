"""The log of a policy in service: what is in the store, what is kept to write it again, and the writer between them."""

import asyncio
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from equipoise_server.engine.memory import Backlogs
from equipoise_server.engine.telemetry import Telemetry
from equipoise_server.store import (
    MAX_APPEND_BYTES,
    Fenced,
    LogEntry,
    LogLost,
    Ownership,
    RedisStore,
    StoreError,
    checksum,
    entry_bytes,
    seal,
)

log = structlog.get_logger("equipoise.policy")

FIRST_BACKOFF_S = 0.05
MAX_BACKOFF_S = 1.0
ENTRY_MEMORY_BYTES = 1024
"""What an entry takes in memory beside its bytes: an object for itself and for each of its fields."""


@dataclass(slots=True)
class StoreRecord:
    """What the store holds of one policy, as its owner knows: the one record that writer, sweep and tail share.

    Attributes:
        owner: the right to write; its generation is the set of keys that is written.
        base: pages and header hold every version up to it.
        durable_version: newest version that is in the log.
        log_bytes: bytes of the log's entries, about.
        log_replay_s: about how long their replay takes, seconds.
        changes: grows whenever the store turns out to hold less than was thought, and when everything is written anew.
            Whoever relies on what he wrote compares it before and after.
        republishing: whether everything is being written anew.
    """

    owner: Ownership
    base: int
    durable_version: int
    log_bytes: int = 0
    log_replay_s: float = 0.0
    changes: int = 0
    republishing: bool = False

    def appended(self, version: int, *, size: int, replay_s: float) -> None:
        """The log was continued up to a version."""
        self.durable_version = version
        self.log_bytes += size
        self.log_replay_s += replay_s

    def trimmed(self, version: int) -> None:
        """Pages and header hold every version up to this one, and the log what comes after it."""
        entries = max(self.durable_version - self.base, 1)
        left = max(self.durable_version - version, 0) / entries  # of what lies in between, about the same share
        self.log_bytes = round(self.log_bytes * left)
        self.log_replay_s *= left
        self.base = version

    def went_back(self, version: int) -> None:
        """The store has lost what was above a version."""
        self.changes += 1
        self.durable_version = version

    def republished(self, owner: Ownership, version: int) -> None:
        """All was written anew, as of a version; the log is empty."""
        self.changes += 1
        self.owner = owner
        self.base = self.durable_version = version
        self.log_bytes, self.log_replay_s = 0, 0.0


class LogTail:
    """The newest log entries, so that what the store lacks can be written, also again.

    Attributes:
        base: version before the first entry.
        size: bytes of memory that the entries take.
    """

    def __init__(self, base: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.base = base
        self.size = 0
        self._clock = clock
        self._entries: deque[tuple[LogEntry, int, float, float]] = deque()
        self._checksum = 0
        """Of the newest entry; 0: not known."""

    @property
    def last_version(self) -> int:
        """Version of the newest entry, or the base."""
        return self.base + len(self._entries)

    def add(self, entry: LogEntry, *, replay_s: float) -> int:
        """Adds the entry of the next version, and about how long its replay takes, seconds; the entry's bytes."""
        assert entry.version == self.last_version + 1
        if not entry.seal:
            entry = seal(entry, after=self._checksum)
        self._checksum = checksum(entry)
        size = entry_bytes(entry)
        self._entries.append((entry, size, replay_s, self._clock()))
        self.size += size + ENTRY_MEMORY_BYTES
        return size

    def after(self, version: int, *, max_bytes: int) -> tuple[list[LogEntry], int, float]:
        """Entries behind `version`, together at most `max_bytes` unless it is one; their bytes and replay seconds."""
        taken: list[LogEntry] = []
        total, seconds = 0, 0.0
        for index in range(version - self.base, len(self._entries)):
            entry, size, replay_s, _ = self._entries[index]
            if taken and total + size > max_bytes:
                break
            taken.append(entry)
            total += size
            seconds += replay_s
        return taken, total, seconds

    def age_s(self, version: int) -> float:
        """How long ago the entry behind `version` was added, or else the oldest that is kept; 0 when there is none."""
        if not self._entries or version >= self.last_version:
            return 0.0
        return self._clock() - self._entries[max(version - self.base, 0)][3]

    def forget(self, through_version: int) -> None:
        """Drops the entries up to a version."""
        while self._entries and self.base < through_version:
            self.size -= self._entries.popleft()[1] + ENTRY_MEMORY_BYTES
            self.base += 1
        self.base = max(self.base, through_version)


@dataclass(slots=True)
class Waiter:
    """An answer that waits for a version to be durable, until its deadline (loop time, seconds)."""

    version: int
    deadline: float
    release: Callable[[], None]


class LogWriter:
    """Appends entries to the store's log, one append in flight, whatever has gathered in each.

    A store that does not answer delays each waiting answer by `log_timeout_s` at most, and only until the first of
    them has run out: from then on answers are not held up until the version of that moment is durable.

    The tail never takes more than `backlogs` allows and what one call on the device adds: what is durable is let go
    first; a store that is slow slows the steps (`room`); what a store lacks that fails is let go too, and the tables
    are written anew once it works.
    """

    def __init__(
        self,
        store: RedisStore,
        record: StoreRecord,
        *,
        tail: LogTail,
        log_timeout_s: float,
        backlogs: Backlogs,
        telemetry: Telemetry,
        republish: Callable[[Callable[[], None]], Awaitable[tuple[Ownership, int]]],
        on_rollback: Callable[[], None],
        is_long: Callable[[StoreRecord], bool],
    ) -> None:
        self.record = record
        self.tail = tail
        self.failing = False
        """Whether the store did not take what was written last."""
        self.backlogs = backlogs
        self._store = store
        self._log_timeout_s = log_timeout_s
        self._telemetry = telemetry
        self._republish = republish
        self._on_rollback = on_rollback
        self._is_long = is_long
        self.long = asyncio.Event()
        """Set when the log has become so long that it is to be shortened."""
        self._loop = asyncio.get_running_loop()
        self._waiters: deque[Waiter] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._wake = asyncio.Event()
        self._watchers: list[asyncio.Future[None]] = []
        self._lagging_until: int | None = None
        self._overrun = False
        self._overrun_at = 0.0
        self._failing_since = 0.0
        self._ended = False
        if is_long(record):
            self.long.set()
        self._let_go()

    @property
    def backlog(self) -> int:
        """Versions that are not in the store yet."""
        return self.tail.last_version - self.record.durable_version

    @property
    def is_behind(self) -> bool:
        """Whether the store lacks anything."""
        return self.backlog > 0 or self._overrun or self.record.republishing

    @property
    def lag_s(self) -> float:
        """How long ago the oldest step was taken that the store lacks, seconds; 0: it lacks none."""
        if self._overrun or self.record.republishing:
            return self._loop.time() - self._overrun_at
        return self.tail.age_s(self.record.durable_version)

    @property
    def is_full(self) -> bool:
        """Whether steps have to wait: the store is slow, and the memory for what it lacks is used up."""
        return self.tail.size > self.backlogs.limit and not self.failing and not self._ended

    def add(self, entry: LogEntry, *, replay_s: float) -> None:
        """Queues an entry for the log."""
        self.tail.add(entry, replay_s=replay_s)
        self._let_go()
        self._wake.set()

    def when_durable(self, version: int, release: Callable[[], None]) -> None:
        """Calls `release` once the version is in the store, or its time is up."""
        if version <= self.record.durable_version or self._lagging_until is not None:
            release()
            return
        self._waiters.append(Waiter(version, self._loop.time() + self._log_timeout_s, release))
        if self._timer is None:
            self._timer = self._loop.call_at(self._waiters[0].deadline, self._expire)

    async def wait_durable(self, version: int, *, changes: int | None = None) -> None:
        """Returns once the version is in the store, or the writer has ended; with `changes`, once these differ."""
        record = self.record
        while not self._ended and changes in (None, record.changes):
            if record.durable_version >= version and not (self._overrun or record.republishing):
                return
            await self._change()

    async def room(self) -> None:
        """Returns when a step may be applied: soon, unless the store is slow."""
        self._let_go()
        while self.is_full:
            await self._change()

    async def flush(self, *, timeout_s: float) -> bool:
        """Waits until everything is in the store; False when the time is up before, or the writer has ended."""
        try:
            async with asyncio.timeout(timeout_s):
                await self.wait_durable(self.tail.last_version)
        except TimeoutError:
            pass
        return not self.is_behind

    def trimmed(self, version: int) -> None:
        """A sweep has written everything up to a version, and trimmed the store's log to what follows."""
        self.record.trimmed(version)
        self.tail.forget(version)
        self._let_go()
        self.long.clear()
        if self._is_long(self.record):
            self.long.set()

    def lose(self, last_version: int | None) -> None:
        """The store was found to have lost what is above a version; None: everything."""
        if not self.record.republishing:
            self._rewind(last_version)
            self._wake.set()

    def end(self) -> None:
        """Nothing is written any more: nobody waits longer."""
        self._ended = True
        self.backlogs.note(self, 0)
        if self._timer is not None:
            self._timer.cancel()
        self._note_change()

    async def run(self) -> None:
        """Writes until cancelled. Raises Fenced when another server owns the policy, or it was deleted."""
        backoff_s = FIRST_BACKOFF_S
        while True:
            try:
                await self._write_backlog()
                backoff_s = FIRST_BACKOFF_S
                self._wake.clear()
                if not self.is_behind:
                    await self._wake.wait()
            except LogLost as lost:
                again = self._overrun  # even a policy that is written anew is lost again and again: not in a hurry
                self._rewind(lost.last_version)
                if again:
                    await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
                    backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
            except Fenced:
                self._telemetry.fenced()
                raise
            except StoreError as error:
                self._fail(error)
                await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
                backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    async def _write_backlog(self) -> None:
        if self._overrun:
            await self._write_anew()
        record = self.record
        while not self._overrun:
            batch, size, replay_s = self.tail.after(record.durable_version, max_bytes=MAX_APPEND_BYTES)
            if not batch:
                return
            await self._store.append(record.owner, batch)
            self._recover()
            record.appended(batch[-1].version, size=size, replay_s=replay_s)
            self._advance()

    async def _write_anew(self) -> None:
        record = self.record
        record.republishing = True
        record.changes += 1
        self._overrun = False
        try:
            owner, version = await self._republish(self._recover)
        except BaseException:
            self._overrun = True
            raise
        finally:
            record.republishing = False
        self.tail.forget(version)
        self._overrun = self.tail.base > version  # what came meanwhile did not fit: once more
        record.republished(owner, version)
        self._advance()

    def _advance(self) -> None:
        version = self.record.durable_version
        if self._lagging_until is not None and version >= self._lagging_until:
            self._lagging_until = None
        while self._waiters and self._waiters[0].version <= version:
            self._waiters.popleft().release()
        self._let_go()
        if self._is_long(self.record):
            self.long.set()
        self._note_change()

    def _rewind(self, last_version: int | None) -> None:
        """The store has lost the newest entries: write them again from the tail, or everything from the tables."""
        log.warning("redis went back: it lacks what was acknowledged", policy=self._policy, last_version=last_version)
        self._on_rollback()
        if last_version is None or last_version < self.tail.base:
            self.record.changes += 1
            self._overrun_by_now()
        else:
            self.record.went_back(min(last_version, self.record.durable_version))
        self._note_change()

    def _let_go(self) -> None:
        """Bounds the tail: first by what the store has, then, while the store fails, by what the tables hold too."""
        self.backlogs.note(self, self.tail.size)
        if self.tail.size > self.backlogs.limit:
            self.tail.forget(self.record.durable_version)
        if self.failing and self.tail.size > self.backlogs.limit:
            if not self._overrun:
                log.warning("the log in memory is full: redis gets the tables once it works", policy=self._policy)
            self._overrun_by_now()
            self.tail.forget(self.tail.last_version)
        self.backlogs.note(self, self.tail.size)

    def _overrun_by_now(self) -> None:
        """The tail is not enough any more for what the store lacks."""
        if not self._overrun:
            self._overrun_at = self._loop.time() - self.lag_s
        self._overrun = True

    def _fail(self, error: StoreError) -> None:
        if not self.failing:
            log.warning("redis does not take the log", policy=self._policy, error=str(error), backlog=self.backlog)
            self._failing_since = self._loop.time()
        self.failing = True
        self._let_go()
        self._note_change()

    def _recover(self) -> None:
        """The store has taken something."""
        if self.failing:
            seconds = round(self._loop.time() - self._failing_since, 3)
            log.info("redis takes the log again", policy=self._policy, seconds=seconds, backlog=self.backlog)
        self.failing = False

    def _expire(self) -> None:
        self._timer = None
        if not self._waiters:
            return
        if self._waiters[0].deadline <= self._loop.time():
            self._lagging_until = self.tail.last_version
            while self._waiters:
                self._waiters.popleft().release()
        else:
            self._timer = self._loop.call_at(self._waiters[0].deadline, self._expire)

    @property
    def _policy(self) -> str:
        return self.record.owner.policy

    def _note_change(self) -> None:
        watchers, self._watchers = self._watchers, []
        for watcher in watchers:
            if not watcher.done():
                watcher.set_result(None)

    async def _change(self) -> None:
        """Returns at the next change of the record, of `failing` or of the end."""
        watcher: asyncio.Future[None] = self._loop.create_future()
        self._watchers.append(watcher)
        await watcher
