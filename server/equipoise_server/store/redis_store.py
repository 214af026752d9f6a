"""The store: policies, their logs and pages, in Redis."""

import asyncio
import dataclasses
import secrets
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import AbstractAsyncContextManager, suppress

from redis.asyncio import RedisCluster

from equipoise_server.redis_url import RedisAccess, RedisUrl
from equipoise_server.store import scripts
from equipoise_server.store.checksums import sealed_text
from equipoise_server.store.commands import Client, Commands
from equipoise_server.store.connect import (
    COMMAND_TIMEOUT_S,
    CONNECTIONS,
    RESERVED_CONNECTIONS,
    client_for,
    close_client,
    direct_connections,
)
from equipoise_server.store.errors import StoreError
from equipoise_server.store.faults import REDIS_FAULTS
from equipoise_server.store.format import FORMAT
from equipoise_server.store.keys import PolicyKeys
from equipoise_server.store.locks import Locks
from equipoise_server.store.log import PolicyLog
from equipoise_server.store.observer import Observer
from equipoise_server.store.pages import PageTable
from equipoise_server.store.policies import PolicyTable
from equipoise_server.store.probe import probe
from equipoise_server.store.records import (
    Fence,
    LogEntry,
    LogState,
    Owner,
    Ownership,
    Page,
    PageBatch,
    ServerLoad,
    StoredPolicy,
)
from equipoise_server.store.salvage import Salvage


class RedisStore:
    """All of one Redis's policies under a key prefix.

    Every method raises `Unavailable` when Redis does not answer well within about two command timeouts (an append of
    many MiB may take longer, while it gets on); a write that ended so may have been applied and can be repeated. Writes
    take an `Ownership` and raise `Fenced` once it is no longer the current one, `LogLost` when Redis has forgotten it.
    """

    def __init__(
        self,
        client: Client,
        *,
        prefix: str = "equipoise",
        command_timeout_s: float = COMMAND_TIMEOUT_S,
        observer: Observer | None = None,
        confirms_writes: bool = False,
        wait_replicas: int = 0,
        appending: Client | None = None,
    ) -> None:
        self._clients = (client, appending) if appending else (client,)
        self._direct = direct_connections(client, timeout_s=command_timeout_s)
        self._wait_replicas = wait_replicas
        self._confirms_writes = confirms_writes
        self._commands = Commands(client, timeout_s=command_timeout_s, observer=observer)
        # What is long, and what many policies do at once after a restart, leaves connections to the steps.
        bulk = asyncio.Semaphore(CONNECTIONS - RESERVED_CONNECTIONS)
        patient = Commands(client, timeout_s=command_timeout_s, observer=observer, at_once=bulk)
        self._prefix = prefix
        self._policies = PolicyTable(self._commands, prefix=prefix, patient=patient)
        self._log = PolicyLog(
            self._commands,
            prefix=prefix,
            reading=patient,
            appending=Commands(
                appending or client, timeout_s=command_timeout_s, observer=observer, direct=self._direct
            ),
            replicas=wait_replicas,
            large_at_once=CONNECTIONS - RESERVED_CONNECTIONS if self._direct else None,
        )
        self._pages = PageTable(patient, prefix=prefix)
        self._locks = Locks(self._commands, prefix=prefix)

    @classmethod
    def connect(
        cls,
        url: RedisUrl | str,
        *,
        access: RedisAccess | None = None,
        prefix: str = "equipoise",
        command_timeout_s: float = COMMAND_TIMEOUT_S,
        observer: Observer | None = None,
        confirms_writes: bool = False,
        wait_replicas: int = 0,
    ) -> "RedisStore":
        """A store at a URL; opens no connection yet.

        Args:
            url: a `RedisUrl`, or what it parses.
            access: credentials that the URL does not hold, and certificates.
            prefix: first part of every key.
            command_timeout_s: seconds to wait for a connection, and for an answer.
            observer: told of every command and error.
            confirms_writes: for a Redis with `appendfsync no` on whose file durability rests. It answers an append in
                the turn of its loop in which it writes its file, also when that write fails (a full disk); it refuses
                a PING from then on. So an append is only done once a PING behind it is answered.
            wait_replicas: how many replicas of Redis must have an append before it is done.

        Raises:
            InvalidStoreUrl: not such a URL.
        """

        def client() -> Client:
            return client_for(url, access=access, command_timeout_s=command_timeout_s)

        found = client()
        return cls(
            found,
            prefix=prefix,
            command_timeout_s=command_timeout_s,
            observer=observer,
            confirms_writes=confirms_writes,
            wait_replicas=wait_replicas,
            appending=client() if isinstance(found, RedisCluster) else None,
        )

    async def ping(self) -> None:
        """Reach Redis once."""
        await self._commands.run("ping", "PING")

    async def probe(self) -> None:
        """Find out whether this Redis can keep policies. Raises Unavailable, which says what is wrong."""
        await probe(self._commands, prefix=self._prefix, replicas=self._wait_replicas)

    def salvage(self) -> Salvage:
        """A way to what is damaged, for repair."""
        return Salvage(self._commands, prefix=self._prefix)

    async def close(self) -> None:
        """Close all connections; the store cannot be used afterwards."""
        if self._direct is not None:
            await self._direct.close()
        for client in self._clients:
            with suppress(*REDIS_FAULTS):  # the other side does not take part
                await close_client(client)

    def lock(self, name: str, *, lease_s: float, wait_s: float) -> AbstractAsyncContextManager[None]:
        """Surrounds what only one server at a time may do, for `lease_s` at most; waits up to `wait_s` for it."""
        return self._locks.lock(name, lease_s=lease_s, wait_s=wait_s)

    async def create(self, policy: StoredPolicy) -> tuple[StoredPolicy, bool]:
        """Store a policy unless its name is taken; the stored one, and whether it is new."""
        return await self._policies.create(policy)

    async def get(self, name: str) -> StoredPolicy | None:
        """The policy of that name."""
        return await self._policies.get(name)

    async def list_policies(self, *, after: str = "", prefix: str = "", limit: int) -> list[StoredPolicy]:
        """At most `limit` policies in the order of their names: those after `after` that begin with `prefix`."""
        return await self._policies.select(after=after, prefix=prefix, limit=limit)

    async def delete(self, name: str, *, uid: str | None = None) -> str:
        """Delete a policy (only the one with `uid`, if given) and return its uid; late writers get `Deleted`.

        Raises:
            NotFound: no such policy; repeating a deletion by uid is no error.
        """
        return await self._policies.delete(name, uid=uid)

    async def acquire(
        self, name: str, *, address: str, instance: str = "", elsewhere: Callable[[], Awaitable[str]] | None = None
    ) -> Ownership:
        """Become the owner of a policy: earlier owners are fenced, what they left half-written is removed.

        Args:
            name: of the policy.
            address: where this server can be reached; an owner of the same address is a former self, unless
                `claim_address` has found it alive.
            instance: this server, if it sends heartbeats.
            elsewhere: finds the address of the server that should own it, asked if none does; empty: this one.

        Raises:
            NotFound: no such policy.
            OwnedElsewhere: another server owns it, and lives; or none does, and it should be elsewhere.
            TooNew: a newer release has stored it; nothing was changed.
        """
        return await self._policies.acquire(name, address=address, instance=instance, elsewhere=elsewhere)

    async def departing(self, names: Sequence[str]) -> set[str]:
        """Which of these policies, one or more, belong to servers that live and leave."""
        return await self._policies.departing(names)

    async def release(self, owner: Ownership) -> None:
        """Give a policy up, for any server to acquire; this owner is fenced from here on."""
        await self._policies.release(owner)

    async def check_fences(self, owners: Sequence[Ownership]) -> list[Fence]:
        """Whether others have acquired or deleted these policies since, or Redis has forgotten them."""
        return await self._policies.check_fences(owners)

    async def heartbeat(
        self, instance: str, *, address: str, ttl_s: float, load: ServerLoad | None = None, leaving: bool = False
    ) -> bool:
        """Say for another `ttl_s` seconds that a server lives; whether it still counted as alive.

        With `load` it is on the list of those that take policies; without, it is not. One that is `leaving` takes no
        callers any more and gives its policies up.

        While it does, its policies are its own; afterwards they are whose who acquires them. Nothing safe hangs on it:
        writes are fenced by tokens.
        """
        return await self._policies.heartbeat(instance, address=address, load=load, leaving=leaving, ttl_s=ttl_s)

    async def servers(self) -> dict[str, ServerLoad]:
        """What each server says of itself that lives and takes policies, by its address."""
        return await self._policies.servers()

    async def claim_address(self, instance: str, *, address: str, ttl_s: float) -> str:
        """Say who is reached at an address; empty, or another server that has said so since this one did.

        From then on that one is no former self of this one: what it owns stays with it.
        """
        return await self._policies.claim_address(instance, address=address, ttl_s=ttl_s)

    async def leave_servers(self, instance: str) -> None:
        """Say that a server takes no more policies; it still owns what it owns, until its heartbeats end."""
        await self._policies.leave_servers(instance)

    async def end_heartbeat(self, instance: str) -> None:
        """Say that a server is gone: what it still owns may be acquired."""
        await self._policies.end_heartbeat(instance)

    async def owner(self, name: str) -> Owner | None:
        """Who acquired the policy last; None where nobody has, or it was deleted."""
        return await self._policies.owner(name)

    async def append(self, owner: Ownership, entries: Sequence[LogEntry]) -> None:
        """Append entries (versions without gaps) to the log; those it already has are skipped.

        Raises:
            Fenced: another owner, or deleted.
            LogLost: the log ends before the first entry's predecessor, or is gone.
            Unavailable: also when not enough replicas have them (`wait_replicas`).
        """
        await self._log.append(owner, entries)
        if self._confirms_writes:
            await self._log.ping()

    async def confirm(self, owner: Ownership) -> None:
        """Return once all that there is of a policy is as safe as after an append; see `wait_replicas`."""
        await self._log.confirm(owner)

    async def read_log(self, policy: Ownership | str, *, after: int) -> AsyncGenerator[LogEntry, None]:
        """The log's entries with versions above `after`, in order.

        Raises:
            NotFound: no policy of that name.
            LogLost: the log is gone or has a gap.
        """
        name, generation = await self._locate(policy)
        async for entry in self._log.read(name, generation, after=after):
            yield entry

    async def read_log_chunk(
        self, owner: Ownership, *, after: int, count: int, first: bool, before: int
    ) -> tuple[list[LogEntry], int]:
        """See `PolicyLog.read_chunk`."""
        return await self._log.read_chunk(
            owner.policy, owner.generation, after=after, count=count, first=first, before=before
        )

    async def log_state(self, policy: Ownership | str) -> LogState:
        """Last version, number of entries and bytes of a policy's log; errors as for `read_log`."""
        return await self._log.state(*await self._locate(policy))

    async def trim(self, owner: Ownership, *, through_version: int) -> None:
        """Drop the log's entries up to and with `through_version`; the last version stays known."""
        await self._log.trim(owner, through_version=through_version)

    async def write_page(self, owner: Ownership, index: int, page: Page, *, batch: PageBatch) -> None:
        """Replace a page; readers see the old or the new one, whole. See `PageTable.write_page`."""
        await self._pages.write_page(owner, index, page, batch=batch)

    async def num_pages(self, owner: Ownership) -> int:
        """Pages written so far have indices below this."""
        return await self._policies.num_pages(owner)

    async def manifest(self, owner: Ownership) -> dict[int, int]:
        """Version of every page that was written, by index. See `PageTable.manifest`."""
        return await self._pages.manifest(owner.policy, owner.generation)

    async def read_page(self, policy: Ownership | str, index: int, *, version: int | None = None) -> Page | None:
        """A page; None where none was written. See `PageTable.read_page`."""
        return await self._pages.read_page(*await self._locate(policy), index, version=version)

    async def write_header(
        self, owner: Ownership, fields: Mapping[str, bytes], *, version: int, batch: PageBatch
    ) -> None:
        """Replace what belongs to no page, whole, behind a batch of pages. See `PageTable.write_header`."""
        await self._pages.write_header(owner, fields, version=version, batch=batch)

    async def read_header(self, policy: Ownership | str) -> dict[str, bytes]:
        """What belongs to no page; empty where nothing was written."""
        return await self._pages.read_header(*await self._locate(policy))

    async def republish(
        self,
        owner: Ownership,
        policy: StoredPolicy,
        *,
        version: int,
        pages: Iterable[tuple[int, Page]] | AsyncIterable[tuple[int, Page]],
        header: Mapping[str, bytes],
    ) -> Ownership:
        """Write a whole policy anew, after Redis was flushed or lost more than the owner's tail of the log.

        Everything goes into a new generation of keys that becomes the policy's in the last step: until then readers see
        what Redis still had, and a crash half-way leaves nothing half visible.

        Args:
            owner: the ownership that Redis forgot; its token and epoch stay.
            policy: what to store.
            version: last version contained in pages and header; the new log is empty and goes on from there.
            pages: all pages by index, each once.
            header: what belongs to no page.

        Returns:
            The ownership to use from now on: same token and epoch, new generation.

        Raises:
            Fenced: somebody else acquired, deleted or newly created the policy meanwhile.
        """
        renewed = dataclasses.replace(owner, generation=f"{policy.uid}.{secrets.token_hex(4)}")
        await self._write_anew(renewed, policy, version=version, pages=pages, header=header)
        await self._log.confirm(renewed)
        return renewed

    async def publish(
        self,
        policy: StoredPolicy,
        *,
        address: str,
        pages: Iterable[tuple[int, Page]] | AsyncIterable[tuple[int, Page]],
        header: Mapping[str, bytes],
    ) -> Ownership:
        """Store a new policy together with its tables, at version 0; it appears only when all of it is there.

        Raises:
            Fenced: the name is taken, or was taken meanwhile.
        """
        epoch = await self._policies.last_epoch(policy.name) + 1
        claim = Ownership(
            policy=policy.name,
            uid=policy.uid,
            token=secrets.token_hex(16),
            epoch=epoch,
            generation=policy.uid,
            address=address,
        )
        try:
            await self._write_anew(claim, policy, version=0, pages=pages, header=header)
        except BaseException:  # also a caller who has gone: nobody else would remove what is there
            with suppress(StoreError):
                await asyncio.shield(self._policies.collect(policy.name))
            raise
        return claim

    async def _write_anew(
        self,
        owner: Ownership,
        policy: StoredPolicy,
        *,
        version: int,
        pages: Iterable[tuple[int, Page]] | AsyncIterable[tuple[int, Page]],
        header: Mapping[str, bytes],
    ) -> None:
        await self._begin_republication(owner, version=version)
        await self._policies.collect(policy.name, keep=owner.generation)  # what earlier attempts have left
        batch = PageBatch()
        async for index, page in _each(pages):
            await self._pages.write_page(owner, index, page, batch=batch, published=False)
        await self._pages.write_header(owner, header, version=version, batch=batch, published=False)
        await self._policies.enter_index(policy.name)
        await self._end_republication(owner, policy, batch)
        with suppress(StoreError):  # the next one does it
            await self._policies.collect(policy.name)

    async def _begin_republication(self, owner: Ownership, *, version: int) -> None:
        keys = PolicyKeys(self._prefix, owner.policy)
        await self._commands.script(
            "republish",
            scripts.REPUBLISH_BEGIN,
            policy=owner.policy,
            keys=[keys.spec, keys.owner, keys.staging, keys.log(owner.generation)],
            arguments=[owner.uid, owner.token, owner.epoch, owner.address, owner.generation, version, owner.instance],
        )

    async def _end_republication(self, owner: Ownership, policy: StoredPolicy, batch: PageBatch) -> None:
        keys = PolicyKeys(self._prefix, owner.policy)
        settings = [repr(policy.create_time), sealed_text(policy.spec), owner.generation]
        await self._commands.script(
            "republish",
            scripts.REPUBLISH_END,
            policy=owner.policy,
            keys=[keys.spec, keys.owner, keys.log(owner.generation)],
            arguments=[owner.uid, owner.token, owner.epoch, *settings, batch.id, batch.pages, FORMAT],
        )

    async def _locate(self, policy: Ownership | str) -> tuple[str, str]:
        name = policy if isinstance(policy, str) else policy.policy
        return name, await self._policies.generation(policy)


async def _each(
    pages: Iterable[tuple[int, Page]] | AsyncIterable[tuple[int, Page]],
) -> AsyncIterator[tuple[int, Page]]:
    if isinstance(pages, AsyncIterable):
        async for numbered in pages:
            yield numbered
    else:
        for numbered in pages:
            yield numbered
