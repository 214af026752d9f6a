"""Pages: large values written in bounded pieces and swapped in whole.

A page is a Redis hash. Its columns are cut into pieces `<column>/<number>`, collected under the policy's staging key by
commands of at most `MAX_COMMAND_BYTES`, and the last of these renames the staging key to the page. A small page is one
command. A header is cut alike.
"""

import asyncio
import secrets
from collections.abc import Iterator, Mapping, Sequence
from weakref import WeakValueDictionary

from equipoise_server.store import scripts
from equipoise_server.store.checksums import of_columns
from equipoise_server.store.commands import Commands
from equipoise_server.store.direct import Argument
from equipoise_server.store.errors import Damaged
from equipoise_server.store.keys import PolicyKeys
from equipoise_server.store.limits import MAX_COMMAND_BYTES
from equipoise_server.store.records import Ownership, Page, PageBatch

# Room for the protocol's framing, the keys and the fixed arguments of one command.
_OVERHEAD_BYTES = 4096
_PIECE_OVERHEAD_BYTES = 64
_BUDGET_BYTES = MAX_COMMAND_BYTES - _OVERHEAD_BYTES
# Lua hands the pieces of one command over on its stack, which is limited to some thousands of values.
_MAX_PIECES = 1000

_VERSION = "version"
_CHECKSUM = "checksum"


class PageTable:
    """Writes and reads pages and headers."""

    def __init__(self, commands: Commands, *, prefix: str) -> None:
        self._commands = commands
        self._prefix = prefix
        # A policy has one staging key: its pages are written one after another.
        self._writing: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def write_page(
        self, owner: Ownership, index: int, page: Page, *, batch: PageBatch, published: bool = True
    ) -> None:
        """Replace a page; readers see the old or the new one, whole.

        Args:
            owner: the right to write.
            index: of the page.
            page: what to write.
            batch: the pages of one sweep or republication, which Redis counts.
            published: whether the owner's generation is the policy's; else it is about to become it.

        Raises:
            Fenced: another owner, or deleted.
            LogLost: the owner's record is gone, or the log ends before the page's version.
        """
        target = PolicyKeys(self._prefix, owner.policy).page(owner.generation, index)
        fixed = {_VERSION: str(page.version).encode(), _CHECKSUM: of_columns(page.version, page.columns)}
        arguments: list[Argument] = [page.version, batch.id, "", owner.generation, index]
        await self._write(owner, target, fixed, page.columns, arguments=arguments, published=published)
        batch.pages += 1

    async def manifest(self, policy: str, generation: str) -> dict[int, int]:
        """Version of every page that was written, by index.

        Raises Damaged when Redis has lost a part of it, or the header: a key that is gone, as where it evicts, must
        never be taken for one that was never written.
        """
        keys = PolicyKeys(self._prefix, policy)
        found = await self._read("read_manifest", keys.manifest(generation))
        names = (f"manifest:{generation}", f"header:{generation}")
        count, header = await self._commands.run("read_manifest", "HMGET", keys.owner, *names)
        if count is not None and int(count) != len(found):
            raise Damaged(policy, what="the list of its pages", why=f"{len(found)} of {int(count)} are there")
        if header is not None and not await self._commands.run("read_manifest", "EXISTS", keys.header(generation)):
            raise Damaged(policy, what="the header", why="Redis does not have it any more")
        return {int(index): int(version) for index, version in found.items()}

    async def read_page(self, policy: str, generation: str, index: int, *, version: int | None = None) -> Page | None:
        """A page; None where none was written.

        Raises Damaged for one that is not what was written, or not of `version` (None: of any, also of none).
        """
        fields = await self._read("read_page", PolicyKeys(self._prefix, policy).page(generation, index))
        if _VERSION.encode() not in fields:
            if version is not None:
                raise Damaged(policy, what=f"page {index}", why="Redis does not have it any more")
            return None
        if version is not None and int(fields[_VERSION.encode()]) != version:
            raise Damaged(policy, what=f"page {index}", why=f"it is not the one of version {version}")
        page = Page(version=int(fields[_VERSION.encode()]), columns=_joined(fields))
        _check(policy, f"page {index}", fields, of_columns(page.version, page.columns))
        return page

    async def write_header(
        self,
        owner: Ownership,
        fields: Mapping[str, bytes],
        *,
        version: int,
        batch: PageBatch,
        published: bool = True,
    ) -> None:
        """Replace what belongs to no page, as of a version, behind the pages of a batch.

        Errors as for `write_page`, and LogLost when Redis has not all of the batch's pages.
        """
        target = PolicyKeys(self._prefix, owner.policy).header(owner.generation)
        arguments: list[Argument] = [version, batch.id, batch.pages, owner.generation, 0]
        fixed = {_CHECKSUM: of_columns(0, fields)}
        await self._write(owner, target, fixed, fields, arguments=arguments, published=published)

    async def read_header(self, policy: str, generation: str) -> dict[str, bytes]:
        """What belongs to no page; empty where nothing was written. Raises Damaged."""
        fields = await self._read("read_header", PolicyKeys(self._prefix, policy).header(generation))
        header = _joined(fields)
        _check(policy, "the header", fields, of_columns(0, header))
        return header

    async def _read(self, name: str, key: str) -> dict[bytes, bytes]:
        fields: dict[bytes, bytes] = await self._commands.run(name, "HGETALL", key)
        return fields

    async def _write(
        self,
        owner: Ownership,
        target: str,
        fixed: Mapping[str, bytes],
        columns: Mapping[str, bytes],
        *,
        arguments: Sequence[Argument],
        published: bool,
    ) -> None:
        keys = PolicyKeys(self._prefix, owner.policy)
        attempt = secrets.token_hex(8)
        commands = list(_commands(fixed, columns))
        generation = owner.generation if published else ""
        lock = self._writing.setdefault(owner.policy, asyncio.Lock())
        async with lock:
            for position, pieces in enumerate(commands):
                first = "1" if position == 0 else ""
                last = "1" if position == len(commands) - 1 else ""
                await self._commands.script(
                    "stage",
                    scripts.STAGE,
                    policy=owner.policy,
                    keys=[
                        *(keys.owner, keys.staging, target, keys.spec),
                        *(keys.log(owner.generation), keys.manifest(owner.generation)),
                    ],
                    arguments=[owner.token, owner.epoch, generation, attempt, first, last, *arguments, *pieces],
                )


def _check(policy: str, what: str, fields: Mapping[bytes, bytes], expected: bytes) -> None:
    if fields.get(_CHECKSUM.encode(), expected) != expected:  # releases before 0.2 wrote none
        raise Damaged(policy, what=what)


def _pieces(columns: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
    for column, value in columns.items():
        step = _BUDGET_BYTES - _PIECE_OVERHEAD_BYTES - len(column.encode())
        view = memoryview(value)
        for number, start in enumerate(range(0, max(len(value), 1), step)):
            yield f"{column}/{number}", bytes(view[start : start + step])


def _commands(fixed: Mapping[str, bytes], columns: Mapping[str, bytes]) -> Iterator[list[str | bytes]]:
    """Names and values of pieces, in lists that each fit one command."""
    command: list[str | bytes] = [part for pair in fixed.items() for part in pair]
    size = 0
    for name, value in _pieces(columns):
        added = _PIECE_OVERHEAD_BYTES + len(name) + len(value)
        if command and (size + added > _BUDGET_BYTES or len(command) >= 2 * _MAX_PIECES):
            yield command
            command, size = [], 0
        command += [name, value]
        size += added
    if command:
        yield command


def _joined(fields: Mapping[bytes, bytes]) -> dict[str, bytes]:
    pieces: dict[str, dict[int, bytes]] = {}
    for name, value in fields.items():
        column, slash, number = name.decode().rpartition("/")
        if slash:
            pieces.setdefault(column, {})[int(number)] = value
    return {column: b"".join(cut[number] for number in sorted(cut)) for column, cut in pieces.items()}
