"""The engine: every policy this server owns, brought in from the store when it is first touched."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from contextvars import Context
from dataclasses import replace
from typing import TypeAlias

import structlog

from equipoise_server import logs
from equipoise_server.engine import tables
from equipoise_server.engine.departures import Departures
from equipoise_server.engine.device import Device
from equipoise_server.engine.header import Header
from equipoise_server.engine.limits import EngineLimits
from equipoise_server.engine.loading import Loading, store_failed
from equipoise_server.engine.memory import Backlogs, check_room, free_bytes
from equipoise_server.engine.placement import STAY_S, Spreading, Wish
from equipoise_server.engine.resting import Resting
from equipoise_server.engine.runner import PolicyRunner
from equipoise_server.engine.spec import PolicySpec
from equipoise_server.engine.status import ServiceStatus
from equipoise_server.engine.telemetry import Telemetry
from equipoise_server.engine.trainers import Trainers
from equipoise_server.errors import (
    ServiceError,
    draining,
    internal,
    invalid,
    name_taken,
    not_owner,
    policy_deleted,
    policy_not_found,
    uid_mismatch,
    unloaded,
)
from equipoise_server.rules import Slices, build
from equipoise_server.store import Fenced, NotFound, Page, RedisStore, ServerLoad, StoredPolicy, StoreError

log = structlog.get_logger("equipoise.policy")

LOCK_LEASE_S = 60.0
LOCK_WAIT_S = 5.0
"""Less than a client waits for a call."""
UNLOAD_FLUSH_S = 5.0
"""How long a policy that leaves memory may write its pages."""

FENCE_CHECKS = 256
"""Policies asked for in one round trip."""

NumberedPages: TypeAlias = Iterable[tuple[int, Page]] | AsyncIterable[tuple[int, Page]]


class Engine:
    """Creates, finds, reads and deletes policies; for one event loop."""

    def __init__(
        self,
        store: RedisStore,
        device: Device,
        *,
        address: str,
        limits: EngineLimits,
        telemetry: Telemetry,
        instance: str = "",
        spreads: bool = False,
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
            spreads: whether it takes only its share of the policies, if it sends heartbeats.
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
        self._loop = asyncio.get_running_loop()
        self.released = 0
        """How many policies it has let go of."""
        self._runners: dict[str, PolicyRunner] = {}
        self.backlogs = Backlogs(max_bytes=limits.max_backlogs_bytes, max_policy_bytes=limits.max_backlog_bytes)
        self._loads: dict[str, tuple[Loading, asyncio.Task[PolicyRunner]]] = {}
        self._departures = Departures(store)
        self._resting = Resting()
        self._spreading = (
            Spreading(
                store, address=lambda: self.address, load=lambda: self.load, holds=lambda name: name in self._held
            )
            if spreads and instance
            else None
        )

    @property
    def runners(self) -> list[PolicyRunner]:
        """The policies that are in memory now."""
        return list(self._runners.values())

    @property
    def load(self) -> ServerLoad | None:
        """What this server has in memory, or on its way there, and room for; None: its device does not answer."""
        try:
            free = free_bytes(self.device.device)
        except RuntimeError:  # CUDA's: a device that has failed would draw policies, as it has none
            return None
        return ServerLoad(policies=len(self._held), free_bytes=free)

    @property
    def _held(self) -> set[str]:
        """The policies in memory, and those that are being loaded and will not go elsewhere any more."""
        return self._runners.keys() | {name for name, (loading, _) in self._loads.items() if loading.uid}

    @property
    def services(self) -> list[ServiceStatus]:
        """How each policy is served that is in memory, and how those stood that left it because nobody used them."""
        return [*(runner.service for runner in self.runners), *self._resting.statuses]

    @property
    def loadings(self) -> list[Loading]:
        """The policies that are on their way into memory."""
        return [loading for loading, _ in self._loads.values()]

    def is_known(self, name: str) -> bool:
        """Whether a policy is in memory, or on its way there."""
        return name in self._runners or name in self._loads

    async def create(self, spec: PolicySpec, *, wish: Wish = Wish.HERE) -> tuple[StoredPolicy, bool]:
        """Stores a policy, uniform at version 0, unless one of this name exists; which one, and whether it is new.

        Raises ServiceError: NOT_OWNER when it is to be created elsewhere, DEVICE_FULL.
        """
        try:
            if self._spreading and wish is Wish.ANYWHERE and (address := await self._spreading.elsewhere(spec)):
                raise not_owner(spec.name, address)
            check_room(spec, self.device.device)
            return await self._store.create(self._fresh(spec))
        except StoreError as error:
            raise store_failed(error) from error

    async def create_from(self, spec: PolicySpec, header: Header, pages: NumberedPages) -> StoredPolicy:
        """Stores a policy with the tables of another one, as pages of version 0; it appears only when all is there.

        Raises ServiceError (POLICY_EXISTS) when the name is taken.
        """
        fresh = self._fresh(spec)
        header = replace(header, progress=replace(header.progress, version=0), trainers="{}")
        try:
            if await self._store.get(spec.name):
                raise name_taken(spec.name)
            await self._store.publish(fresh, address=self.address, pages=pages, header=header.to_fields())
        except Fenced as error:  # somebody was faster
            raise name_taken(spec.name) from error
        except StoreError as error:
            raise store_failed(error) from error
        return fresh

    async def check_tables(self, spec: PolicySpec, header: Header, pages: Iterable[tuple[int, Page]]) -> None:
        """Raises ServiceError: INVALID_STATE when the rule can never have made such tables, DEVICE_FULL."""
        check_room(spec, self.device.device)
        try:
            await self.device.queue(spec.name).run_slices(self._check_tables(spec, header, pages))
        except ValueError as error:  # a RuleError among them
            raise invalid("INVALID_STATE", "chunk.data", str(error)) from error

    @asynccontextmanager
    async def lock(self, name: str) -> AsyncIterator[None]:
        """Surrounds what one server of a store at a time may do; a minute, after which another may begin."""
        try:
            async with self._store.lock(name, lease_s=LOCK_LEASE_S, wait_s=LOCK_WAIT_S):
                yield
        except StoreError as error:
            raise store_failed(error) from error

    async def find(self, name: str) -> StoredPolicy:
        """The stored policy. Raises ServiceError (POLICY_NOT_FOUND)."""
        try:
            stored = await self._store.get(name)
        except StoreError as error:
            raise store_failed(error) from error
        if stored is None:
            raise policy_not_found(name)
        return stored

    async def list_policies(self, *, after: str, prefix: str, limit: int) -> list[StoredPolicy]:
        """Stored policies in the order of their names, behind `after`."""
        try:
            return await self._store.list_policies(after=after, prefix=prefix, limit=limit)
        except StoreError as error:
            raise store_failed(error) from error

    async def runner(
        self, name: str, *, uid: str = "", wait_s: float | None = None, wish: Wish = Wish.HERE
    ) -> PolicyRunner:
        """The policy in service, loaded if need be; loading goes on when the caller leaves.

        Args:
            name: of the policy.
            uid: raise UID_MISMATCH when it is another incarnation; empty: any.
            wait_s: how long the caller can wait, seconds; None: as long as the opening of a stream does.
            wish: where the policy should be if no server owns it.

        Raises ServiceError: POLICY_NOT_FOUND, UID_MISMATCH, NOT_OWNER, DRAINING; LOADING after `wait_s`.
        """
        end = self._loop.time() + (self.limits.load_wait_s if wait_s is None else wait_s)
        runner = await self._runner(name, end, wish)
        while uid and uid != runner.policy.uid:
            with suppress(ServiceError):  # it ends here, if the store knows better
                await runner.check_fence()
            if runner.closed is None:
                raise uid_mismatch(name, runner.policy.uid, uid)
            runner = await self._runner(name, end, wish)
        if wish is Wish.STAY:
            runner.stay(STAY_S)
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
            raise store_failed(error) from error
        self._resting.forget(name)
        if (entry := self._loads.get(name)) and entry[0].uid == deleted:
            await self._end_load(name)
        if (runner := self._runners.get(name)) and runner.policy.uid == deleted:
            await runner.stop(policy_deleted(name))
        log.info("deleted", policy=name, uid=deleted)
        return deleted

    async def unload_idle(self, *, idle_s: float) -> None:
        """Lets go of policies that nobody has used for `idle_s` and that are in the store, and of idle trainers.

        Of those that rest, it forgets which are no longer this server's.
        """
        for runner in self.runners:
            if runner.is_idle(idle_s):
                await runner.stop(unloaded(runner.spec_name), flush_timeout_s=UNLOAD_FLUSH_S)
            elif runner.closed is None:
                with suppress(ServiceError):  # it ends just now
                    await runner.forget_idle()
        with suppress(StoreError):  # another time
            await self._resting.refresh(self._store)

    async def check_fences(self) -> None:
        """Lets go of policies that another server has acquired, or that were deleted. Raises StoreError."""
        runners = self.runners
        for start in range(0, len(runners), FENCE_CHECKS):
            some = runners[start : start + FENCE_CHECKS]
            found = await self._store.check_fences([runner.owner for runner in some])
            for runner, fence in zip(some, found, strict=True):
                runner.fence(fence)

    async def balance(self) -> None:
        """Hands over some policies when this server has more than its share. Raises StoreError."""
        if self._spreading is not None and not self._draining:
            await self._spreading.balance(self.runners)

    async def hand_over(self, error: ServiceError, *, flush_timeout_s: float) -> None:
        """Asks every stream to reconnect elsewhere, and gives each policy up once its last stream has ended."""
        await self._end_loads()
        runners = self.runners
        for runner in runners:
            runner.drain()
        await asyncio.gather(*(runner.hand_over(error, flush_timeout_s=flush_timeout_s) for runner in runners))

    async def close(self, error: ServiceError, *, flush_timeout_s: float) -> None:
        """Writes what is not in the store yet, then stops every policy."""
        await self._end_loads()
        await asyncio.gather(*(runner.stop(error, flush_timeout_s=flush_timeout_s) for runner in self.runners))
        if self._spreading is not None:
            await self._spreading.close()

    async def _runner(self, name: str, end: float, wish: Wish) -> PolicyRunner:
        """The policy in service, until a moment (loop time, seconds)."""
        if (leaving := self._runners.get(name)) and leaving.closed is not None:
            await leaving.wait_closed(timeout_s=end - self._loop.time())
        began_before = name in self._loads
        while (runner := self._runners.get(name)) is None:
            if self._draining:
                raise draining()
            if name not in self._loads:
                self._start_load(name, wish)
            loading, task = self._loads[name]
            done, _ = await asyncio.wait([task], timeout=max(0.0, end - self._loop.time()))
            if not done:
                raise loading.not_yet()
            if task.cancelled():  # what was loaded has been deleted, or the server stops
                continue
            # It may have been created since: look once more.
            if began_before and _reason(task.exception()) == "POLICY_NOT_FOUND":
                began_before = False
                continue
            if wish is not Wish.ANYWHERE and loading.may_go_elsewhere and _reason(task.exception()) == "NOT_OWNER":
                continue  # it was begun for a caller who could go there
            return task.result()
        return runner

    def _start_load(self, name: str, wish: Wish) -> None:
        loading = Loading(
            name,
            store=self._store,
            device=self.device,
            address=self.address,
            instance=self._instance,
            limits=self.limits,
            departures=self._departures,
            elsewhere=self._spreading.elsewhere if self._spreading and wish is Wish.ANYWHERE else None,
            wall_clock=self._wall_clock,
        )
        # A context of its own: the log must not name the request that happened to come first for all that follows.
        task = self._loop.create_task(self._load(loading), context=Context())
        self._loads[name] = loading, task
        task.add_done_callback(lambda task: self._load_ended(name, task))

    def _load_ended(self, name: str, task: "asyncio.Task[PolicyRunner]") -> None:
        if not task.cancelled():
            task.exception()  # told to who waits
        if name in self._loads and self._loads[name][1] is task:
            del self._loads[name]

    async def _load(self, loading: Loading) -> PolicyRunner:
        try:
            loaded = await loading.run()
            runner = PolicyRunner(
                loaded,
                store=self._store,
                limits=self.limits,
                backlogs=self.backlogs,
                telemetry=self._telemetry,
                on_closed=self._forget,
                wall_clock=self._wall_clock,
            )
        except asyncio.CancelledError:
            raise
        except ServiceError as error:
            if error.reason in ("NOT_OWNER", "POLICY_NOT_FOUND"):
                self._resting.forget(loading.name)
            self._telemetry.not_loaded(reason=error.reason)
            raise
        except Exception as error:
            error_id = logs.new_id()
            log.exception("a policy cannot be loaded", policy=loading.name, error_id=error_id)
            self._telemetry.not_loaded(reason="BUG")
            raise internal(error_id) from error
        self._runners[loading.name] = runner
        self._resting.forget(loading.name)
        self._telemetry.loaded(seconds=loading.seconds)
        return runner

    async def _end_loads(self) -> None:
        """Nothing is loaded any more."""
        self._draining = True
        for name in list(self._loads):
            await self._end_load(name)

    async def _end_load(self, name: str) -> None:
        if name in self._loads:
            _, task = self._loads[name]
            if not task.cancelling():
                task.cancel()
            await asyncio.wait([task])

    def _forget(self, runner: PolicyRunner) -> None:
        if self._runners.get(runner.spec_name) is runner:
            del self._runners[runner.spec_name]
            self.released += 1
            if runner.closed is not None and runner.closed.reason == "UNLOADED":
                self._resting.add(runner.owner, runner.service)

    def _fresh(self, spec: PolicySpec) -> StoredPolicy:
        return StoredPolicy(
            name=spec.name, uid=secrets.token_hex(16), create_time=self._wall_clock(), spec=spec.to_json()
        )

    def _check_tables(self, spec: PolicySpec, header: Header, pages: Iterable[tuple[int, Page]]) -> Slices[None]:
        rule = build(spec.rule, spec.settings)
        state = yield from rule.init_slices(spec.num_examples, device=self.device.device)
        header.put_into(state, Trainers(self.limits.trainer_idle_s, self.limits.max_trainers))
        for index, page in pages:
            tables.load_page(state, index, page.columns)
            yield
        yield from rule.restore_slices(state)


def _reason(error: BaseException | None) -> str:
    return error.reason if isinstance(error, ServiceError) else ""
