"""What is left of a policy, read without trust, and changes that bring it back: for repair alone.

Elsewhere whatever is damaged is an error; here it is a fact.
"""

import json
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from equipoise_server.store.checksums import check, checksum, opened_text
from equipoise_server.store.commands import Commands
from equipoise_server.store.direct import Argument
from equipoise_server.store.errors import Damaged, LogLost, TooNew
from equipoise_server.store.format import FORMAT, number
from equipoise_server.store.keys import PolicyKeys, heartbeat_key, index_key
from equipoise_server.store.limits import READ_CHUNK_ENTRIES
from equipoise_server.store.log import PolicyLog, as_entry
from equipoise_server.store.pages import PageTable
from equipoise_server.store.policies import TOMBSTONE_TTL_S, PolicyTable
from equipoise_server.store.records import LogEntry, Ownership
from equipoise_server.store.scripts import Script

T = TypeVar("T")

ADDRESS = "equipoise repair"
"""In the place of a server's, while a policy is repaired."""

_SCAN_COUNT = 1000

# KEYS owner, log, then every other key that is named; ARGV token ('': nobody holds it), version behind which the log is
# cut ('': it is not), version at which an empty log begins anew ('': it does not), JSON list of further commands, which
# come first.
SALVAGE = Script("""
local held = redis.call('HGET', KEYS[1], 'token') or ''
if held ~= ARGV[1] then return {'FENCED'} end
for _, command in ipairs(cjson.decode(ARGV[4])) do redis.call(unpack(command)) end
if ARGV[2] ~= '' then
  local from = string.format('%.0f-0', tonumber(ARGV[2]) + 1)
  local found = redis.call('XRANGE', KEYS[2], from, '+', 'COUNT', 500)
  while #found > 0 do
    local ids = {}
    for i = 1, #found do ids[i] = found[i][1] end
    redis.call('XDEL', KEYS[2], unpack(ids))
    found = redis.call('XRANGE', KEYS[2], from, '+', 'COUNT', 500)
  end
  redis.call('XSETID', KEYS[2], ARGV[2] == '0' and '0-1' or ARGV[2] .. '-0')
end
if ARGV[3] ~= '' then
  redis.call('UNLINK', KEYS[2])
  redis.call('XADD', KEYS[2], ARGV[3] == '0' and '0-1' or ARGV[3] .. '-0', '', '')
  redis.call('XTRIM', KEYS[2], 'MAXLEN', 0)
end
return {'OK'}
""")


@dataclass(frozen=True, slots=True, kw_only=True)
class Remains:
    """What there is of a policy, apart from its log's entries.

    Attributes:
        policy: name.
        generation: of its keys; empty: not known, and nothing can be found.
        uid: of the policy.
        spec: why the specification cannot be used; empty: it can.
        owner: fields of the owner's record; none: it is gone.
        header: what belongs to no page; None: there is none.
        header_damage: why it cannot be used; empty: it can.
        pages: version of each page that is whole.
        page_damage: why a page that was written cannot be used as it is.
        manifest_damage: what is wrong with the list of the pages; empty: nothing.
        last_version: of the log; None: there is no log.
    """

    policy: str
    generation: str = ""
    uid: str = ""
    spec: str = ""
    owner: Mapping[str, str] = field(default_factory=dict)
    header: Mapping[str, bytes] | None = None
    header_damage: str = ""
    pages: Mapping[int, int] = field(default_factory=dict)
    page_damage: Mapping[int, str] = field(default_factory=dict)
    manifest_damage: str = ""
    last_version: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What is to be written.

    Attributes:
        owner: fields of the owner's record to set.
        without_header: whether the header goes.
        pages: that go.
        manifest: the whole list of pages afterwards; None: it stays.
        cut_log: version behind which the log is cut; None: it is not.
        restart_log: version at which it begins anew, empty; None: it does not.
        trim_log: version up to which entries go, that nobody needs; None: none.
    """

    owner: Mapping[str, str] = field(default_factory=dict)
    without_header: bool = False
    pages: frozenset[int] = frozenset()
    manifest: Mapping[int, int] | None = None
    cut_log: int | None = None
    restart_log: int | None = None
    trim_log: int | None = None


class Salvage:
    """Finds what is left of policies in a Redis, and changes it."""

    def __init__(self, commands: Commands, *, prefix: str) -> None:
        self._commands = commands
        self._prefix = prefix
        self._pages = PageTable(commands, prefix=prefix)
        self._log = PolicyLog(commands, prefix=prefix)
        self._policies = PolicyTable(commands, prefix=prefix)

    async def names(self) -> list[str]:
        """Every name with a record of any kind; the index may be what was lost."""
        found = {name.decode() for name in await self._commands.run("list", "ZRANGE", index_key(self._prefix), 0, -1)}
        before, after = f"{self._prefix}:{{", "}:owner"
        for key in await self._commands.scan(f"{before}*{after}", count=_SCAN_COUNT):
            found.add(key.decode(errors="replace").removeprefix(before).removesuffix(after))
        return sorted(found)

    async def remains(self, policy: str) -> Remains | None:
        """What there is of a policy; None: there was none, or it was deleted. Raises TooNew."""
        keys = PolicyKeys(self._prefix, policy)
        spec = _text(await self._commands.run("get", "HGETALL", keys.spec))
        owner = _text(await self._commands.run("owner", "HGETALL", keys.owner))
        if not spec and "uid" not in owner:
            return None
        if (found := number(spec.get("format"))) > FORMAT:
            raise TooNew(policy, found=found)
        generation, uid = spec.get("generation", ""), spec.get("uid", "")
        damage = "it is gone" if not spec else "" if generation and uid else "a part of it is gone"
        try:
            opened_text(policy, spec.get("spec", ""))
        except Damaged as error:
            damage = damage or error.why
        if damage:
            uid = uid or owner.get("uid", "")
            return Remains(policy=policy, generation=generation, uid=uid, spec=damage, owner=owner)
        header, header_damage = await self._header(policy, generation)
        pages, page_damage, manifest_damage = await self._read_pages(policy, generation, owner)
        try:
            last_version = (await self._log.state(policy, generation)).last_version
        except LogLost:
            last_version = None
        return Remains(
            policy=policy,
            generation=generation,
            uid=uid,
            owner=owner,
            header=header,
            header_damage=header_damage,
            pages=pages,
            page_damage=page_damage,
            manifest_damage=manifest_damage,
            last_version=last_version,
        )

    async def entries(self, remains: Remains, *, after: int) -> AsyncIterator[tuple[LogEntry, int]]:
        """The log behind a version: each entry, and the version of what is damaged, its own or the one before; or 0."""
        key = PolicyKeys(self._prefix, remains.policy).log(remains.generation)
        last, before = after, 0
        while found := await self._commands.run(
            "read_log", "XRANGE", key, f"{last + 1}-0", "+", "COUNT", READ_CHUNK_ENTRIES
        ):
            for entry in (as_entry(entry_id, pairs) for entry_id, pairs in found):
                damaged = 0
                try:
                    check(remains.policy, entry, before=0)
                    damaged = 0 if _follows(remains.policy, entry, before) else entry.version - 1
                    before = checksum(entry)
                except Damaged:
                    damaged, before = entry.version, 0
                yield entry, damaged
                last = entry.version

    async def acquire(self, remains: Remains) -> Ownership | None:
        """The right to change a policy; None: nobody can be fenced, since the owner's record or the policy is gone.

        Raises OwnedElsewhere: a server that lives serves it.
        """
        if not remains.owner:
            return None
        try:
            return await self._policies.acquire(remains.policy, address=ADDRESS, instance="")
        except Damaged:
            return None

    async def release(self, owner: Ownership | None) -> None:
        """Leave it to any server."""
        if owner is not None:
            await self._policies.release(owner)

    async def server(self, remains: Remains) -> str:
        """Address of the server that serves a policy, and lives; empty: none."""
        key = heartbeat_key(self._prefix, remains.owner.get("instance", ""))
        if not remains.owner.get("token") or not await self._commands.run("owner", "EXISTS", key):
            return ""
        return remains.owner.get("address", "")

    async def write(self, remains: Remains, changes: Changes, *, owner: Ownership | None, backup: str) -> None:
        """Change a policy in one atomic step, after a copy of what changes under another prefix.

        Args:
            remains: of the policy.
            changes: what to write.
            owner: from `acquire`.
            backup: prefix of the copies' keys; empty: none are made.

        Raises:
            Fenced: somebody has acquired it since.
        """
        keys, generation = PolicyKeys(self._prefix, remains.policy), remains.generation
        changed, commands = [keys.owner], list[Sequence[Argument]]()
        if changes.manifest is not None:
            changed.append(keys.manifest(generation))
            commands.append(("UNLINK", keys.manifest(generation)))
            for some in _pieces(list(changes.manifest.items())):
                commands.append(("HSET", keys.manifest(generation), *_flat(some)))
        if changes.without_header:
            changed.append(keys.header(generation))
            commands.append(("UNLINK", keys.header(generation)))
            commands.append(("HDEL", keys.owner, f"header:{generation}"))
        for index in sorted(changes.pages):
            changed.append(keys.page(generation, index))
            commands.append(("UNLINK", keys.page(generation, index)))
        if (changes.cut_log, changes.restart_log, changes.trim_log) != (None, None, None):
            changed.append(keys.log(generation))
        if changes.trim_log is not None:
            commands.append(("XTRIM", keys.log(generation), "MINID", f"{changes.trim_log + 1}-0"))
        if changes.owner:
            commands.append(("HSET", keys.owner, *_flat(changes.owner.items())))
        ends = changes.cut_log, changes.restart_log
        await self._write(keys, owner, changed, commands, ends=ends, backup=backup)

    async def delete(self, remains: Remains, *, owner: Ownership | None, backup: str) -> None:
        """Delete a policy, whatever is left of it, after a copy; see `write`."""
        keys, doomed = PolicyKeys(self._prefix, remains.policy), [PolicyKeys(self._prefix, remains.policy).spec]
        numbers = {name.partition(":")[2]: int(pages) for name, pages in remains.owner.items() if name[:6] == "pages:"}
        for generation in {remains.generation, *numbers} - {""}:
            doomed += [keys.log(generation), keys.header(generation), keys.manifest(generation)]
            doomed += [keys.page(generation, index) for index in range(numbers.get(generation, 0))]
        kept = {"epoch"}
        commands: list[Sequence[Argument]] = [("UNLINK", *some) for some in _pieces([*doomed, keys.staging])]
        if fields := [name for name in remains.owner if name not in kept]:
            commands.append(("HDEL", keys.owner, *fields))
        commands.append(("HSET", keys.owner, "deleted", remains.uid))
        commands.append(("HSETNX", keys.owner, "epoch", 0))
        commands.append(("EXPIRE", keys.owner, TOMBSTONE_TTL_S))
        await self._write(keys, owner, [keys.owner, *doomed], commands, ends=(None, None), backup=backup)
        await self._commands.run("index", "ZREM", index_key(self._prefix), remains.policy)

    async def _write(
        self,
        keys: PolicyKeys,
        owner: Ownership | None,
        changed: Sequence[str],
        commands: Sequence[Sequence[Argument]],
        *,
        ends: tuple[int | None, int | None],
        backup: str,
    ) -> None:
        copies = {key: backup + key.removeprefix(self._prefix) for key in changed} if backup else {}
        log = keys.log(owner.generation) if owner else next((key for key in changed if key.endswith(":log")), keys.spec)
        words = [*(("COPY", key, copy) for key, copy in copies.items()), *commands]
        await self._commands.script(
            "repair",
            SALVAGE,
            policy=keys.policy,
            keys=list(dict.fromkeys([keys.owner, log, keys.spec, keys.staging, *changed, *copies.values()])),
            arguments=[
                "" if owner is None else owner.token,
                *("" if end is None else end for end in ends),
                json.dumps([[str(word) for word in command] for command in words]),
            ],
        )

    async def _header(self, policy: str, generation: str) -> tuple[Mapping[str, bytes] | None, str]:
        try:
            return await self._pages.read_header(policy, generation) or None, ""
        except Damaged as error:
            return None, error.why

    async def _read_pages(
        self, policy: str, generation: str, owner: Mapping[str, str]
    ) -> tuple[dict[int, int], dict[int, str], str]:
        """Versions of the pages that are whole, what is wrong with others, and with their list."""
        keys = PolicyKeys(self._prefix, policy)
        found = await self._commands.run("repair", "HGETALL", keys.manifest(generation))
        listed = {int(index): int(version) for index, version in found.items()}
        counted = int(owner.get(f"manifest:{generation}", len(listed)))
        indices = {*range(int(owner.get(f"pages:{generation}", 0))), *listed}
        if not owner:
            indices |= await self._scanned_pages(keys.page(generation, 0).removesuffix("0"))
        pages, damage = dict[int, int](), dict[int, str]()
        for index in sorted(indices):
            try:
                page = await self._pages.read_page(policy, generation, index)
            except Damaged as error:
                damage[index] = error.why
                continue
            if page is not None:
                pages[index] = page.version
                if index in listed and page.version != listed[index]:
                    damage[index] = f"it is the one of version {page.version}, not of {listed[index]}"
            elif index in listed:
                damage[index] = "it is gone"
        if counted == len(listed):
            return pages, damage, ""
        missing = counted - len(pages.keys() | damage.keys())
        more = f", and {missing} more pages are gone, nobody knows which" if missing > 0 else ""
        return pages, damage, f"{len(listed)} of {counted} are there{more}"

    async def _scanned_pages(self, prefix: str) -> set[int]:
        keys = [key.decode() for key in await self._commands.scan(f"{prefix}*", count=_SCAN_COUNT)]
        return {int(key.removeprefix(prefix)) for key in keys}


def _follows(policy: str, entry: LogEntry, before: int) -> bool:
    try:
        check(policy, entry, before=before)
    except Damaged:
        return False
    return True


def _text(fields: Mapping[bytes, bytes]) -> dict[str, str]:
    return {name.decode(errors="replace"): value.decode(errors="replace") for name, value in fields.items()}


def _pieces(words: Sequence[T]) -> Iterable[Sequence[T]]:
    """Lua hands a command's words over on its stack, which is limited to some thousands."""
    return (words[start : start + _SCAN_COUNT] for start in range(0, len(words), _SCAN_COUNT))


def _flat(pairs: Iterable[tuple[Argument, Argument]]) -> Iterable[Argument]:
    return (each for pair in pairs for each in pair)
