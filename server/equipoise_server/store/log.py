"""A policy's log: a Redis Stream whose entry ids are `<version>-0`."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from itertools import pairwise

from equipoise_server.store import scripts
from equipoise_server.store.checksums import check, checksum
from equipoise_server.store.commands import Commands
from equipoise_server.store.direct import Argument
from equipoise_server.store.errors import LogLost
from equipoise_server.store.keys import PolicyKeys
from equipoise_server.store.limits import MAX_APPEND_BYTES, READ_CHUNK_BYTES, READ_CHUNK_ENTRIES
from equipoise_server.store.records import LogEntry, LogState, Ownership

_ENTRY_OVERHEAD_BYTES = 64
LARGE_APPEND_BYTES, LARGE_WAIT_S = 2 * MAX_APPEND_BYTES, 0.1
"""More than this is a single long step; how long it waits for another one."""
_SEAL = "+"
"""Name of the field that holds an entry's seal; no field of a step is called so."""


class PolicyLog:
    """Appends to logs, reads and trims them; the stream's last generated id is the truth about the last version."""

    def __init__(
        self,
        commands: Commands,
        *,
        prefix: str,
        reading: Commands | None = None,
        appending: Commands | None = None,
        replicas: int = 0,
        large_at_once: int | None = None,
    ) -> None:
        """Prepare.

        Args:
            commands: runs what is short.
            prefix: first part of every key.
            reading: runs the reads of entries, which are long.
            appending: runs the appends, which may wait for replicas.
            replicas: how many must have an entry before it counts as appended.
            large_at_once: most large appends at once, however long they take; None: no bound.
        """
        self._commands = commands
        self._reading = reading or commands
        self._appending = appending or commands
        self._replicas = replicas
        self._prefix = prefix
        self._places = nullcontext() if large_at_once is None else asyncio.Semaphore(large_at_once)
        self._large = asyncio.Lock()
        """Held for an append that Redis takes milliseconds for: those behind it wait for one such, not for many."""

    async def append(self, owner: Ownership, entries: Sequence[LogEntry]) -> None:
        """Append entries that follow the log's last version; entries it already has are skipped.

        One atomic step, or several where the entries exceed `MAX_APPEND_BYTES` together. After any failure the same
        entries, or any run of versions that overlaps them, can be sent again.

        Raises:
            Unavailable: also when not enough replicas have them in time (`replicas`); they are in the log all the same.
            Fenced: another owner, or deleted.
            LogLost: the log ends before `entries[0].version - 1`.
            ValueError: the versions have a gap.
        """
        for before, entry in pairwise(entries):
            if entry.version != before.version + 1:
                raise ValueError(f"entries: version {entry.version} follows {before.version}; versions have no gaps")
        keys = PolicyKeys(self._prefix, owner.policy)
        for batch, size in _batches(entries):
            async with self._large_turn() if size > LARGE_APPEND_BYTES else nullcontext():
                await self._appending.script(
                    "append",
                    scripts.APPEND,
                    policy=owner.policy,
                    keys=[keys.owner, keys.log(owner.generation), keys.spec],
                    arguments=[owner.token, owner.epoch, owner.generation, batch[0].version, *_flat(batch)],
                    replicas=self._replicas,
                )

    @asynccontextmanager
    async def _large_turn(self) -> AsyncIterator[None]:
        """One at a time, unless it takes long: a node of a cluster that hangs does not hold up those to others."""
        async with self._places:  # the other connections are for small ones
            try:
                async with asyncio.timeout(LARGE_WAIT_S):
                    await self._large.acquire()
            except TimeoutError:
                yield
                return
            try:
                yield
            finally:
                self._large.release()

    async def ping(self) -> None:
        """Return once Redis answers behind all appends that have returned. Raises Unavailable."""
        await self._appending.run("confirm", "PING")

    async def confirm(self, owner: Ownership) -> None:
        """Return once as many replicas as an append needs have all that there is of a policy. Raises Unavailable."""
        if self._replicas:
            key = PolicyKeys(self._prefix, owner.policy).owner
            await self._appending.wait_replicas("confirm", key=key, replicas=self._replicas)

    async def read(self, policy: str, generation: str, *, after: int) -> AsyncIterator[LogEntry]:
        """The entries with versions above `after`, in order; errors as for `read_chunk`."""
        count, last, before = 1, after, 0
        while True:
            first = last == after
            chunk, following = await self.read_chunk(
                policy, generation, after=last, count=count, first=first, before=before
            )
            for entry in chunk:
                yield entry
            if len(chunk) < count:
                return
            count, last, before = following, chunk[-1].version, checksum(chunk[-1])

    async def read_chunk(
        self, policy: str, generation: str, *, after: int, count: int, first: bool = False, before: int = 0
    ) -> tuple[list[LogEntry], int]:
        """At most `count` entries with versions above `after`, and how many to ask for next: some MiB of them.

        Args:
            policy: name.
            generation: whose log.
            after: version before the first one.
            count: most entries.
            first: nothing has been read yet: the log may begin later.
            before: checksum of the entry of version `after`; 0: not known.

        Raises:
            LogLost: there is no log, or it has a gap.
            Damaged: an entry is not what was written, or does not follow the one before it.
        """
        key = PolicyKeys(self._prefix, policy).log(generation)
        found = await self._reading.run("read_log", "XRANGE", key, f"{after + 1}-0", "+", "COUNT", count)
        if not found:
            if first:
                await self.state(policy, generation)  # an empty log is one, too
            return [], count
        chunk = [as_entry(entry_id, pairs) for entry_id, pairs in found]
        last = chunk[0].version - 1 if first else after
        for entry in chunk:
            if entry.version != last + 1:
                raise LogLost(policy, last_version=last)
            check(policy, entry, before=before)
            last, before = entry.version, checksum(entry)
        return chunk, _next_count(count, max(_size(pairs) for _, pairs in found))

    async def trim(self, owner: Ownership, *, through_version: int) -> None:
        """Drop the entries up to and with `through_version`; the last version stays known.

        Raises:
            Fenced: another owner, or deleted.
            LogLost: the owner's record is gone.
        """
        keys = PolicyKeys(self._prefix, owner.policy)
        await self._commands.script(
            "trim",
            scripts.TRIM,
            policy=owner.policy,
            keys=[keys.owner, keys.log(owner.generation), keys.spec],
            arguments=[owner.token, owner.epoch, owner.generation, through_version + 1],
        )

    async def state(self, policy: str, generation: str) -> LogState:
        """Last version, number of entries and bytes.

        Raises:
            LogLost: there is no log.
        """
        key = PolicyKeys(self._prefix, policy).log(generation)
        _, last, entries, size = await self._commands.script("log_state", scripts.LOG_STATE, policy=policy, keys=[key])
        return LogState(last_version=last, entries=entries, bytes=size)


def entry_bytes(entry: LogEntry) -> int:
    """About how many bytes an entry adds to an append; what `MAX_APPEND_BYTES` is compared with."""
    return _ENTRY_OVERHEAD_BYTES + sum(map(len, entry.fields)) + sum(map(len, entry.fields.values()))


def _batches(entries: Sequence[LogEntry]) -> Iterator[tuple[Sequence[LogEntry], int]]:
    """Runs of entries that go out together, and their bytes: more than MAX_APPEND_BYTES only of a single one."""
    start = size = 0
    for position, entry in enumerate(entries):
        added = entry_bytes(entry)
        if position > start and size + added > MAX_APPEND_BYTES:
            yield entries[start:position], size
            start, size = position, 0
        size += added
    if entries:
        yield entries[start:], size


def _flat(entries: Sequence[LogEntry]) -> Iterator[Argument]:
    for entry in entries:
        # A stream entry needs a field: the empty name stands for none.
        fields = entry.fields or {"": b""}
        if entry.seal:
            fields = {**fields, _SEAL: entry.seal}
        yield 2 * len(fields)
        for name, value in fields.items():
            yield name
            yield value


def as_entry(entry_id: bytes, pairs: dict[bytes, bytes]) -> LogEntry:
    """An entry as Redis answers it."""
    fields = {name.decode(): value for name, value in pairs.items() if name}
    seal = fields.pop(_SEAL, b"")
    return LogEntry(version=int(entry_id.split(b"-", 1)[0]), fields=fields, seal=seal)


def _size(pairs: dict[bytes, bytes]) -> int:
    return sum(len(name) + len(value) for name, value in pairs.items()) + 1


def _next_count(count: int, largest: int) -> int:
    return max(1, min(2 * count, READ_CHUNK_BYTES // largest, READ_CHUNK_ENTRIES))
