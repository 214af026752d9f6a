"""Which policies exist and who owns them."""

import secrets
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

from equipoise_server.store import scripts
from equipoise_server.store.checksums import opened_text, sealed_text
from equipoise_server.store.commands import Commands
from equipoise_server.store.errors import Damaged, NotFound, OwnedElsewhere, TooNew
from equipoise_server.store.format import FORMAT, number
from equipoise_server.store.keys import PolicyKeys, address_key, heartbeat_key, index_key, leaving_key, servers_key
from equipoise_server.store.records import Fence, Owner, Ownership, ServerLoad, StoredPolicy

TOMBSTONE_TTL_S = 30 * 86_400
"""How long a deleted policy turns away whoever still writes it: longer than any process is paused."""

_UNLINK_BATCH = 256
MAX_SERVERS = 1000
"""Servers of one store that are looked at."""


class PolicyTable:
    """Creation, lookup, listing, deletion and ownership.

    A policy exists when its spec does. The index of names lies in another slot of a cluster and so cannot change in the
    same step: it is written before the spec, and a listing checks every name against its spec.

    Args:
        commands: runs them.
        prefix: first part of every key.
        patient: for what many policies do at once; it leaves connections to others. None: `commands`.
    """

    def __init__(self, commands: Commands, *, prefix: str, patient: Commands | None = None) -> None:
        self._commands = commands
        self._patient = patient or commands
        self._prefix = prefix
        self._addresses: set[str] = set()
        self._namesakes: set[str] = set()
        """Servers that live and say that they are reached where this one is: none of them is a former self."""

    async def create(self, policy: StoredPolicy) -> tuple[StoredPolicy, bool]:
        """Store a policy unless its name is taken; the stored one, and whether it is new."""
        keys = self._keys(policy.name)
        await self.enter_index(policy.name)
        word, *held = await self._commands.script(
            "create",
            scripts.CREATE,
            policy=policy.name,
            keys=[keys.spec, keys.owner, keys.log(policy.uid)],
            arguments=[policy.uid, repr(policy.create_time), sealed_text(policy.spec), policy.uid, FORMAT],
        )
        # Once more: the deletion of a namesake may have left the index between the two steps.
        await self.enter_index(policy.name)
        return (policy, True) if word == "OK" else (_stored(policy.name, held), False)

    async def get(self, name: str) -> StoredPolicy | None:
        """The policy of that name. Raises Damaged, TooNew."""
        return _stored_or_none(name, await self._commands.run("get", *self._read_spec(name)))

    async def select(self, *, after: str, prefix: str, limit: int) -> list[StoredPolicy]:
        """At most `limit` policies in the order of their names: those after `after` that begin with `prefix`.

        One whose specification is damaged, or too new, is left out.
        """
        found: list[StoredPolicy] = []
        while len(found) < limit:
            wanted = limit - len(found)
            names = await self._names(after=after, prefix=prefix, limit=wanted)
            if not names:
                break
            specs = await self._commands.run_together("list", [self._read_spec(name) for name in names])
            for name, spec in zip(names, specs, strict=True):
                with suppress(Damaged, TooNew):
                    if (policy := _stored_or_none(name, spec)) is not None:
                        found.append(policy)
            if len(names) < wanted:
                break
            after = names[-1]
        return found

    async def delete(self, name: str, *, uid: str | None) -> str:
        """Delete a policy and return its uid; a tombstone keeps its epoch and turns late writers away, for a month.

        Args:
            name: of the policy.
            uid: delete only the policy with this uid; None: whichever has the name.

        Raises:
            NotFound: no such policy; repeating a deletion by uid is no error.
        """
        keys = self._keys(name)
        _, deleted = await self._commands.script(
            "delete",
            scripts.DELETE,
            policy=name,
            keys=[keys.spec, keys.owner, keys.staging],
            arguments=[uid or ""],
        )
        await self._leave_index(name)
        await self.collect(name)
        await self._commands.script("delete", scripts.BURY, policy=name, keys=[keys.owner], arguments=[TOMBSTONE_TTL_S])
        return str(deleted, "ascii")

    async def acquire(
        self, name: str, *, address: str, instance: str, elsewhere: Callable[[], Awaitable[str]] | None = None
    ) -> Ownership:
        """Become the owner of a policy: every earlier owner is fenced from here on.

        Raises:
            NotFound: no such policy.
            OwnedElsewhere: another server owns it, and lives; or none does, and `elsewhere` names where it should be.
            TooNew: a newer release has stored it, and nothing was changed.
        """
        keys = self._keys(name)
        token = secrets.token_hex(16)
        word = "HELD"
        while word == "HELD":  # somebody else was faster: look who
            replaced = await self._replaceable(name, address=address, instance=instance, elsewhere=elsewhere)
            word, *found = await self._patient.script(
                "acquire",
                scripts.ACQUIRE,
                policy=name,
                keys=[keys.spec, keys.owner, keys.staging],
                arguments=[token, address, instance, replaced, FORMAT],
            )
        uid, epoch, generation, found_format = found
        await self.collect(name)
        owner = Ownership(
            policy=name,
            uid=uid.decode(),
            token=token,
            epoch=epoch,
            generation=generation.decode(),
            address=address,
            instance=instance,
        )
        if number(found_format) < FORMAT:
            await self._raise_format(owner)
        return owner

    async def departing(self, names: Sequence[str]) -> set[str]:
        """Which of these policies, one or more, belong to servers that live and leave: two round trips."""
        asked = [("HGET", self._keys(name).owner, "instance") for name in names]
        instances = [str(held or b"", "ascii") for held in await self._patient.run_together("owner", asked)]
        leaving = await self._living(sorted(set(instances) - {""}))
        return {name for name, instance in zip(names, instances, strict=True) if leaving.get(instance)}

    async def release(self, owner: Ownership) -> None:
        """Give a policy up, for any server to acquire."""
        keys = self._keys(owner.policy)
        await self._commands.script(
            "release", scripts.RELEASE, policy=owner.policy, keys=[keys.owner], arguments=[owner.token]
        )

    async def check_fences(self, owners: Sequence[Ownership]) -> list[Fence]:
        """Whether others have acquired or deleted policies since, or Redis has forgotten them."""
        commands: list[tuple[str, ...]] = []
        for owner in owners:
            keys = self._keys(owner.policy)
            commands += [("HMGET", keys.owner, "token", "epoch", "deleted"), ("HGET", keys.spec, "uid")]
        found = await self._commands.run_together("fence_check", commands) if commands else []
        return [_fence(*facts) for facts in zip(owners, found[::2], found[1::2], strict=True)]

    async def heartbeat(
        self, instance: str, *, address: str, load: ServerLoad | None, leaving: bool, ttl_s: float
    ) -> bool:
        """Say for another `ttl_s` seconds that a server lives; whether it still counted as alive."""
        key, said = heartbeat_key(self._prefix, instance), address
        if load is not None:
            said += f" {load.policies} {'' if load.free_bytes is None else load.free_bytes}"
        commands: list[tuple[str | int, ...]] = [("SET", key, said, "PX", round(ttl_s * 1000), "GET")]
        if load is None:  # a heartbeat may have been overtaken by `leave_servers`
            commands.append(("ZREM", servers_key(self._prefix), instance))
        else:
            commands.append(("ZADD", servers_key(self._prefix), 0, instance))
        if leaving:
            commands.append(("SET", leaving_key(self._prefix, instance), 1, "PX", round(ttl_s * 1000)))
        before, *_ = await self._commands.run_together("heartbeat", commands)
        return before is not None

    async def claim_address(self, instance: str, *, address: str, ttl_s: float) -> str:
        """Say for another `ttl_s` seconds who is reached at an address; empty, or the server that has said so since.

        One that has claimed it before this server did may be a former self; one that does so again behind it lives.
        """
        key = address_key(self._prefix, address)
        claim = ("SET", key, instance, "PX", round(ttl_s * 1000))
        before, _ = await self._commands.run_together("heartbeat", [("GET", key), claim])
        is_first = address not in self._addresses
        self._addresses.add(address)
        other = "" if before is None or is_first or before.decode() == instance else str(before, "ascii")
        if other:
            self._namesakes.add(other)
        return other

    async def leave_servers(self, instance: str) -> None:
        """Take a server off the list of those that take policies; it still owns what it owns."""
        await self._commands.run("heartbeat", "ZREM", servers_key(self._prefix), instance)

    async def end_heartbeat(self, instance: str) -> None:
        """Say that a server is gone."""
        await self.leave_servers(instance)
        for key in (heartbeat_key(self._prefix, instance), leaving_key(self._prefix, instance)):
            await self._commands.run("heartbeat", "UNLINK", key)

    async def servers(self) -> dict[str, ServerLoad]:
        """What the servers say that take policies, by address."""
        listed = await self._commands.run(
            "servers", "ZRANGEBYLEX", servers_key(self._prefix), "-", "+", "LIMIT", 0, MAX_SERVERS
        )
        instances = [instance.decode() for instance in listed]
        asked = [("GET", heartbeat_key(self._prefix, instance)) for instance in instances]
        found = await self._commands.run_together("servers", asked) if asked else []
        loads: dict[str, ServerLoad] = {}
        for instance, said in zip(instances, found, strict=True):
            if said is None:
                await self.leave_servers(instance)  # it died; if it lives, its next heartbeat enters it again
                continue
            address, _, numbers = str(said, "utf-8").partition(" ")
            policies, _, free = numbers.partition(" ")
            loads[address] = ServerLoad(policies=int(policies or 0), free_bytes=int(free) if free else None)
        return loads

    async def owner(self, name: str) -> Owner | None:
        """Who acquired the policy last; None where nobody has, or it was deleted."""
        keys = self._keys(name)
        address, epoch = await self._commands.run("owner", "HMGET", keys.owner, "address", "epoch")
        return None if address is None else Owner(address=address.decode(), epoch=int(epoch))

    async def num_pages(self, owner: Ownership) -> int:
        """One more than the highest index of a page written in the owner's generation; 0 for none."""
        held = await self._commands.run("owner", "HGET", self._keys(owner.policy).owner, f"pages:{owner.generation}")
        return int(held or 0)

    async def last_epoch(self, name: str) -> int:
        """Epoch of the last acquisition under that name, also of a deleted policy; 0 for none."""
        return int(await self._commands.run("owner", "HGET", self._keys(name).owner, "epoch") or 0)

    async def generation(self, policy: Ownership | str) -> str:
        """Which generation of keys holds the data of an owned policy, or of the policy with that name.

        Raises:
            NotFound: no policy of that name.
        """
        if isinstance(policy, Ownership):
            return policy.generation
        held = await self._commands.run("get", "HGET", self._keys(policy).spec, "generation")
        if held is None:
            raise NotFound(f"no policy {policy!r}")
        return str(held, "ascii")

    async def enter_index(self, name: str) -> None:
        """Put a name into the index; harmless for names without a policy."""
        await self._commands.run("index", "ZADD", index_key(self._prefix), 0, name)

    async def collect(self, name: str, *, keep: str = "") -> None:
        """Unlink the generations of keys that no spec refers to: of a deleted policy or an abandoned republication.

        Args:
            name: of the policy.
            keep: a generation that is being written; empty: none.
        """
        keys = self._keys(name)
        _, *found = await self._patient.script("collect", scripts.GARBAGE, policy=name, keys=[keys.spec, keys.owner])
        for generation, pages in zip(found[::2], found[1::2], strict=True):
            if generation.decode() != keep:
                await self._unlink(keys, generation.decode(), pages=int(pages))

    async def _unlink(self, keys: PolicyKeys, generation: str, *, pages: int) -> None:
        doomed = [keys.log(generation), keys.header(generation), keys.manifest(generation)]
        doomed.extend(keys.page(generation, index) for index in range(pages))
        for start in range(0, len(doomed), _UNLINK_BATCH):
            await self._commands.run("collect", "UNLINK", *doomed[start : start + _UNLINK_BATCH])
        fields = [f"{kind}:{generation}" for kind in ("pages", "manifest", "header")]
        await self._commands.run("collect", "HDEL", keys.owner, *fields)

    async def _leave_index(self, name: str) -> None:
        await self._commands.run("index", "ZREM", index_key(self._prefix), name)
        # A namesake may have been created in between: then its entry must stay.
        if await self.get(name) is not None:
            await self.enter_index(name)

    async def _names(self, *, after: str, prefix: str, limit: int) -> list[str]:
        low = f"({after}" if after >= prefix and after else f"[{prefix}" if prefix else "-"
        high = b"(" + prefix.encode() + b"\xff" if prefix else b"+"
        index = index_key(self._prefix)
        names = await self._commands.run("list", "ZRANGEBYLEX", index, low, high, "LIMIT", 0, limit)
        return [name.decode() for name in names]

    async def _replaceable(
        self, name: str, *, address: str, instance: str, elsewhere: Callable[[], Awaitable[str]] | None
    ) -> int:
        """Epoch of the owner, which may be replaced: it is gone, or a former self. Raises OwnedElsewhere."""
        held = await self._patient.run("owner", "HMGET", self._keys(name).owner, "epoch", "address", "instance", "uid")
        epoch, owner_address, owner_instance, uid = (value.decode() if value else "" for value in held)
        is_former = owner_address == address and owner_instance not in self._namesakes
        is_self = owner_instance != "" and (owner_instance == instance or is_former)
        is_owned = owner_instance and not is_self
        if is_owned and (leaves := (await self._living([owner_instance])).get(owner_instance)) is not None:
            raise OwnedElsewhere(name, address=owner_address, leaving=leaves)
        if elsewhere is not None and uid and not is_self and (better := await elsewhere()):
            raise OwnedElsewhere(name, address=better)
        return int(epoch or 0)

    async def _living(self, instances: Sequence[str]) -> dict[str, bool]:
        """Which of these servers live, and whether they leave."""
        of_each = (heartbeat_key, leaving_key)
        asked = [("EXISTS", key(self._prefix, instance)) for instance in instances for key in of_each]
        found = await self._patient.run_together("heartbeat", asked) if asked else []
        return {
            instance: bool(leaves)
            for instance, lives, leaves in zip(instances, found[::2], found[1::2], strict=True)
            if lives
        }

    async def _raise_format(self, owner: Ownership) -> None:
        """Before anything else is written of a policy that an older release has stored, and would misread then."""
        keys = self._keys(owner.policy)
        with suppress(Damaged):  # whoever reads it is told
            if (stored := await self.get(owner.policy)) is not None:
                await self._commands.script(
                    "acquire",
                    scripts.RAISE_FORMAT,
                    policy=owner.policy,
                    keys=[keys.owner, keys.spec],
                    arguments=[owner.token, owner.epoch, owner.generation, FORMAT, sealed_text(stored.spec)],
                )

    def _read_spec(self, name: str) -> tuple[str, ...]:
        return ("HMGET", self._keys(name).spec, "uid", "create_time", "spec", "format")

    def _keys(self, name: str) -> PolicyKeys:
        return PolicyKeys(self._prefix, name)


def _fence(owner: Ownership, held: Sequence[bytes | None], uid: bytes | None) -> Fence:
    token, epoch, deleted = held
    if uid is not None and uid.decode() != owner.uid:
        return Fence.DELETED
    if epoch is None or int(epoch) < owner.epoch:
        return Fence.FORGOTTEN
    if token is not None and token.decode() == owner.token:
        return Fence.FORGOTTEN if uid is None else Fence.HELD
    if token is None and deleted is None and uid is not None and int(epoch) == owner.epoch:
        return Fence.RELEASED
    return Fence.FENCED if deleted is None else Fence.DELETED


def _stored(name: str, held: Any) -> StoredPolicy:
    uid, create_time, spec, found = held
    if number(found) > FORMAT:
        raise TooNew(name, found=number(found))
    text = opened_text(name, spec.decode(errors="replace"))
    return StoredPolicy(name=name, uid=uid.decode(), create_time=float(create_time), spec=text)


def _stored_or_none(name: str, held: Any) -> StoredPolicy | None:
    return None if held[0] is None else _stored(name, held)
