"""The engine: every policy this server owns, brought in from the store when it is first touched."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace

import structlog

from equipoise_server.engine import tables
from equipoise_server.engine.device import DeviceThread
from equipoise_server.engine.log import LogTail
from equipoise_server.engine.memory import check_room
from equipoise_server.engine.policy import Policy
from equipoise_server.engine.progress import Progress
from equipoise_server.engine.runner import PolicyRunner, RunnerLimits
from equipoise_server.engine.snapshot import Facts, Snapshot
from equipoise_server.engine.spec import PolicySpec
from equipoise_server.engine.telemetry import Telemetry
from equipoise_server.engine.trainers import Trainers
from equipoise_server.errors import (
    ServiceError,
    draining,
    invalid,
    not_owner,
    policy_exists,
    policy_not_found,
    store_down,
    uid_mismatch,
    unloaded,
)
from equipoise_server.rules import build
from equipoise_server.store import Fenced, NotFound, OwnedElsewhere, Ownership, RedisStore, StoredPolicy, StoreError

log = structlog.get_logger("equipoise.policy")

LOCK_LEASE_S = 60.0
LOCK_WAIT_S = 5.0
"""Less than a client waits for a call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """Bounds of the engine.

    Attributes:
        trainer_idle_s: a trainer idle for longer is forgotten.
        runner: of each policy.
    """

    trainer_idle_s: float
    runner: RunnerLimits


class Engine:
    """Creates, finds, reads and deletes policies; for one event loop."""

    def __init__(
        self,
        store: RedisStore,
        device: DeviceThread,
        *,
        address: str,
        limits: EngineLimits,
        telemetry: Telemetry,
        instance: str = "",
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Prepare; nothing is loaded before it is asked for.

        Args:
            store: the store.
            device: where tables live.
            address: where this server can be reached; may change until it serves.
            limits: bounds.
            telemetry: hears what happens.
            instance: this server's name in the store, if it sends heartbeats there.
            wall_clock: seconds since 1970.
        """
        self.device = device
        self.limits = limits
        self.address = address
        self._store = store
        self._instance = instance
        self._draining = False
        self._telemetry = telemetry
        self._wall_clock = wall_clock
        self._runners: dict[str, PolicyRunner] = {}
        self._loading: dict[str, asyncio.Lock] = {}

    @property
    def runners(self) -> list[PolicyRunner]:
        """The policies that are loaded now."""
        return list(self._runners.values())

    async def create(self, spec: PolicySpec) -> tuple[StoredPolicy, bool]:
        """Stores a policy, uniform at version 0, unless one of this name exists; which one, and whether it is new."""
        check_room(spec, self.device.device)
        fresh = self._fresh(spec)
        try:
            return await self._store.create(fresh)
        except StoreError as error:
            raise store_down(str(error)) from error

    async def create_from(self, spec: PolicySpec, snapshot: Snapshot) -> StoredPolicy:
        """Stores a policy with the tables of a snapshot; it appears only when all of it is there.

        Raises ServiceError: POLICY_EXISTS when the name is taken, INVALID_STATE when the rule can never have made
        such tables.
        """
        await self.device.run(lambda: self._check_tables(spec, snapshot))
        fresh = self._fresh(spec)
        facts = replace(snapshot.facts, progress=replace(snapshot.facts.progress, version=0), trainers="{}")
        snapshot = replace(snapshot, facts=facts)
        try:
            if existing := await self._store.get(spec.name):
                raise policy_exists(spec.name, "policy.name", existing.name, spec.name)
            await self._store.publish(
                fresh, address=self.address, pages=snapshot.pages(), progress=snapshot.facts.to_fields()
            )
        except Fenced as error:  # somebody was faster
            raise policy_exists(spec.name, "policy.name", spec.name, spec.name) from error
        except StoreError as error:
            raise store_down(str(error)) from error
        return fresh

    @asynccontextmanager
    async def lock(self, name: str) -> AsyncIterator[None]:
        """Surrounds what one server of a store at a time may do; a minute, after which another may begin."""
        try:
            async with self._store.lock(name, lease_s=LOCK_LEASE_S, wait_s=LOCK_WAIT_S):
                yield
        except StoreError as error:
            raise store_down(str(error)) from error

    async def find(self, name: str) -> StoredPolicy:
        """The stored policy. Raises ServiceError (POLICY_NOT_FOUND)."""
        if runner := self._runners.get(name):
            return runner.stored
        try:
            stored = await self._store.get(name)
        except StoreError as error:
            raise store_down(str(error)) from error
        if stored is None:
            raise policy_not_found(name)
        return stored

    async def list(self, *, after: str, prefix: str, limit: int) -> list[StoredPolicy]:
        """Stored policies in the order of their names, behind `after`."""
        try:
            return await self._store.list(after=after, prefix=prefix, limit=limit)
        except StoreError as error:
            raise store_down(str(error)) from error

    async def runner(self, name: str, *, uid: str = "") -> PolicyRunner:
        """The policy in service, loaded if need be.

        Raises ServiceError: POLICY_NOT_FOUND, UID_MISMATCH, NOT_OWNER, DRAINING.
        """
        runner = self._runners.get(name)
        if runner is None:
            async with self._loading.setdefault(name, asyncio.Lock()):
                runner = self._runners.get(name) or await self._load(name)
            self._loading.pop(name, None)
        if uid and uid != runner.policy.uid:
            raise uid_mismatch(name, runner.policy.uid, uid)
        return runner

    async def delete(self, name: str, *, uid: str = "") -> str:
        """Deletes a policy; the uid of the deleted incarnation."""
        stored = await self.find(name)
        if uid and uid != stored.uid:
            raise uid_mismatch(name, stored.uid, uid)
        try:
            deleted = await self._store.delete(name, uid=stored.uid)
        except NotFound as error:
            raise policy_not_found(name) from error
        except StoreError as error:
            raise store_down(str(error)) from error
        if runner := self._runners.pop(name, None):
            await runner.deleted()
        return deleted

    async def unload_idle(self, *, idle_s: float) -> None:
        """Lets go of policies that nobody has used for `idle_s` and that are wholly in the store."""
        for runner in self.runners:
            if runner.idle_for() > idle_s and not runner.log.backlog:
                await runner.close(unloaded(runner.spec_name))
                await runner.release()

    async def verify(self) -> None:
        """Lets go of policies that another server has acquired; call after the store took this server for gone."""
        await asyncio.gather(*(runner.verify() for runner in self.runners))

    async def hand_over(self, error: ServiceError, *, flush_timeout_s: float) -> None:
        """Asks every stream to reconnect elsewhere, and gives each policy up once its last stream has ended."""
        self._draining = True
        runners = self.runners
        for runner in runners:
            runner.drain()
        await asyncio.gather(*(runner.hand_over(error, flush_timeout_s=flush_timeout_s) for runner in runners))

    async def close(self, error: ServiceError, *, flush_timeout_s: float) -> None:
        """Writes what is not in the store yet, then stops every policy."""
        runners = self.runners
        await asyncio.gather(*(runner.give_up(error, flush_timeout_s=flush_timeout_s) for runner in runners))

    def _fresh(self, spec: PolicySpec) -> StoredPolicy:
        return StoredPolicy(
            name=spec.name, uid=secrets.token_hex(16), create_time=self._wall_clock(), spec=spec.to_json()
        )

    async def _load(self, name: str) -> PolicyRunner:
        if self._draining:
            raise draining()
        try:
            runner = await self._restore(name)
        except OwnedElsewhere as error:
            raise not_owner(name, error.address) from error
        except NotFound as error:
            raise policy_not_found(name) from error
        except StoreError as error:
            raise store_down(str(error)) from error
        self._runners[name] = runner
        log.info("loaded", policy=name, version=runner.policy.version, epoch=runner.epoch)
        runner.on_closed(lambda: self._forget(runner))
        return runner

    def _forget(self, runner: PolicyRunner) -> None:
        if self._runners.get(runner.spec_name) is runner:
            del self._runners[runner.spec_name]

    async def _restore(self, name: str) -> PolicyRunner:
        """Takes the policy over, then loads its pages and replays its log; from here on older owners are fenced."""
        owner = await self._store.acquire(name, address=self.address, instance=self._instance)
        try:
            return await self._read(owner, name)
        except BaseException:  # such as no room on the device: another server may have some
            with suppress(StoreError):
                await self._store.release(owner)
            raise

    async def _read(self, owner: Ownership, name: str) -> PolicyRunner:
        stored = await self._store.get(name)
        if stored is None:
            raise NotFound(name)
        spec = PolicySpec.from_json(stored.spec)
        facts = Facts.from_fields(await self._store.read_progress(owner))
        policy = await self.device.run(lambda: self._empty(spec, stored.uid))
        versions: dict[int, int] = {}
        for index in range(await self._store.num_pages(owner)):
            if page := await self._store.read_page(owner, index):
                await self.device.run(lambda i=index, p=page: tables.load_page(policy.state, i, p.columns))  # type: ignore[misc]
                versions[index] = page.version
        facts.put_into(policy.state, policy.trainers)
        await self.device.run(lambda: policy.load(facts.progress, versions))
        tail: LogTail | None = None
        async for entry in self._store.read_log(owner, after=0):
            if tail is None:
                tail = LogTail(entry.version - 1)
            await self.device.run(lambda e=entry: policy.replay(e))  # type: ignore[misc]
            tail.add(entry)
        policy.trainers.wake(self._wall_clock())
        return PolicyRunner(
            policy,
            owner,
            stored,
            tail=tail or LogTail(policy.version),
            store=self._store,
            device=self.device,
            limits=self.limits.runner,
            telemetry=self._telemetry,
            wall_clock=self._wall_clock,
        )

    def _check_tables(self, spec: PolicySpec, snapshot: Snapshot) -> None:
        policy = self._empty(spec, "")
        try:
            for index, page in snapshot.pages():
                tables.load_page(policy.state, index, page.columns)
            policy.load(Progress(), {})
        except ValueError as error:  # a RuleError among them
            raise invalid("INVALID_STATE", "chunk.data", str(error)) from error

    def _empty(self, spec: PolicySpec, uid: str) -> Policy:
        check_room(spec, self.device.device)
        rule = build(spec.rule, spec.settings)
        state = rule.init(spec.num_examples, device=self.device.device)
        return Policy(spec, uid, rule=rule, state=state, trainers=Trainers(self.limits.trainer_idle_s))
