"""A policy's log: a Redis Stream whose entry ids are `<version>-0`."""

from collections.abc import AsyncIterator, Iterator, Sequence
from itertools import pairwise

from equipoise_server.store import scripts
from equipoise_server.store.commands import Argument, Commands
from equipoise_server.store.errors import LogLost
from equipoise_server.store.keys import PolicyKeys
from equipoise_server.store.limits import MAX_APPEND_BYTES, READ_CHUNK_BYTES, READ_CHUNK_ENTRIES
from equipoise_server.store.records import LogEntry, LogState, Ownership

_ENTRY_OVERHEAD_BYTES = 64


class PolicyLog:
    """Appends to logs, reads and trims them; the stream's last generated id is the truth about the last version."""

    def __init__(self, commands: Commands, *, prefix: str) -> None:
        self._commands = commands
        self._prefix = prefix

    async def append(self, owner: Ownership, entries: Sequence[LogEntry]) -> None:
        """Append entries that follow the log's last version; entries it already has are skipped.

        One atomic step, or several where the entries exceed `MAX_APPEND_BYTES` together. After any failure the same
        entries, or any run of versions that overlaps them, can be sent again.

        Raises:
            Fenced: another owner, or deleted.
            LogLost: the log ends before `entries[0].version - 1`.
            ValueError: the versions have a gap.
        """
        for before, entry in pairwise(entries):
            if entry.version != before.version + 1:
                raise ValueError(f"entries: version {entry.version} follows {before.version}; versions have no gaps")
        keys = PolicyKeys(self._prefix, owner.policy)
        for batch in _batches(entries):
            await self._commands.script(
                "append",
                scripts.APPEND,
                policy=owner.policy,
                keys=[keys.owner, keys.log(owner.generation), keys.spec],
                arguments=[owner.token, owner.epoch, owner.generation, batch[0].version, *_flat(batch)],
            )

    async def read(self, policy: str, generation: str, *, after: int) -> AsyncIterator[LogEntry]:
        """The entries with versions above `after`, in order; errors as for `read_chunk`."""
        count, last = 1, after
        while True:
            chunk, following = await self.read_chunk(policy, generation, after=last, count=count, first=last == after)
            for entry in chunk:
                yield entry
            if len(chunk) < count:
                return
            count, last = following, chunk[-1].version

    async def read_chunk(
        self, policy: str, generation: str, *, after: int, count: int, first: bool = False
    ) -> tuple[list[LogEntry], int]:
        """At most `count` entries with versions above `after`, and how many to ask for next: some MiB of them.

        Args:
            policy: name.
            generation: whose log.
            after: version before the first one.
            count: most entries.
            first: nothing has been read yet: the log may begin later.

        Raises:
            LogLost: there is no log, or it has a gap.
        """
        key = PolicyKeys(self._prefix, policy).log(generation)
        found = await self._commands.run("read_log", "XRANGE", key, f"{after + 1}-0", "+", "COUNT", count)
        if not found:
            if first:
                await self.state(policy, generation)  # an empty log is one, too
            return [], count
        chunk = [_entry(entry_id, pairs) for entry_id, pairs in found]
        last = chunk[0].version - 1 if first else after
        for entry in chunk:
            if entry.version != last + 1:
                raise LogLost(policy, last_version=last)
            last = entry.version
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


def _batches(entries: Sequence[LogEntry]) -> Iterator[Sequence[LogEntry]]:
    start = size = 0
    for position, entry in enumerate(entries):
        added = entry_bytes(entry)
        if position > start and size + added > MAX_APPEND_BYTES:
            yield entries[start:position]
            start, size = position, 0
        size += added
    if entries:
        yield entries[start:]


def _flat(entries: Sequence[LogEntry]) -> Iterator[Argument]:
    for entry in entries:
        # A stream entry needs a field: the empty name stands for none.
        fields = entry.fields or {"": b""}
        yield 2 * len(fields)
        for name, value in fields.items():
            yield name
            yield value


def _entry(entry_id: bytes, pairs: dict[bytes, bytes]) -> LogEntry:
    version = int(entry_id.split(b"-", 1)[0])
    return LogEntry(version=version, fields={name.decode(): value for name, value in pairs.items() if name})


def _size(pairs: dict[bytes, bytes]) -> int:
    return sum(len(name) + len(value) for name, value in pairs.items()) + 1


def _next_count(count: int, largest: int) -> int:
    return max(1, min(2 * count, READ_CHUNK_BYTES // largest, READ_CHUNK_ENTRIES))
