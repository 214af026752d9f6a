"""A policy on its way from the store into memory."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import structlog

from equipoise_server.engine import tables
from equipoise_server.engine.departures import Departures
from equipoise_server.engine.device import Device, DeviceQueue
from equipoise_server.engine.header import Header
from equipoise_server.engine.limits import EngineLimits
from equipoise_server.engine.log import LogTail, StoreRecord
from equipoise_server.engine.memory import check_room
from equipoise_server.engine.policy import Policy
from equipoise_server.engine.spec import PolicySpec
from equipoise_server.engine.trainers import Trainers
from equipoise_server.errors import (
    ServiceError,
    loading,
    not_owner,
    policy_not_found,
    state_damaged,
    store_down,
    too_new,
)
from equipoise_server.rules import RuleError, build
from equipoise_server.store import (
    FORMAT,
    Damaged,
    LogEntry,
    LogLost,
    NotFound,
    OwnedElsewhere,
    Ownership,
    RedisStore,
    StoredPolicy,
    StoreError,
    TooNew,
    Unavailable,
    checksum,
)

T = TypeVar("T")

log = structlog.get_logger("equipoise.policy")

READ_RETRIES_S = 30.0
"""How long a read of the store is repeated while the store does not answer, seconds."""
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.05, 1.0


def store_failed(error: StoreError) -> ServiceError:
    """What a caller is told: that the store failed, or that what it holds of the policy is damaged, or too new."""
    if isinstance(error, TooNew):
        log.error("a newer release has stored a policy", error=str(error))
        return too_new(str(error), found=error.found, readable=error.readable)
    if isinstance(error, Damaged | LogLost):
        log.error("what redis holds of a policy is damaged", error=str(error))
        return state_damaged(str(error))
    return store_down(str(error))


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A policy as it was in the store, ready to serve, and what the store holds of it."""

    policy: Policy
    stored: StoredPolicy
    record: StoreRecord
    tail: LogTail
    device: DeviceQueue
    host: DeviceQueue


class Loading:
    """Takes a policy over, loads its pages and replays its log; from the first moment on older owners are fenced.

    A task of the engine: it outlives the callers that wait for it, and repeats reads that the store does not answer.

    Args:
        name: of the policy.
        store: where it is.
        device: where it goes.
        address: under which this server is reached.
        instance: this server's name in the store.
        limits: bounds.
        departures: waits for an owner that leaves.
        elsewhere: finds the server that should own a policy that none does; empty: this one.
        wall_clock: seconds since 1970.
    """

    def __init__(
        self,
        name: str,
        *,
        store: RedisStore,
        device: Device,
        address: str,
        instance: str,
        limits: EngineLimits,
        departures: Departures,
        elsewhere: Callable[[PolicySpec], Awaitable[str]] | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.name = name
        self.uid = ""
        """Of the incarnation that is being loaded; empty until it was acquired."""
        self.entries = 0
        """Log entries to replay, as far as is known."""
        self.replayed = 0
        """Log entries replayed so far."""
        self.pages = 0
        """Pages to read, as far as is known."""
        self.read_pages = 0
        """Pages read so far."""
        self.started = time.monotonic()
        self.trouble: StoreError | None = None
        """Why the store is being asked again; None: it answers."""
        self._store = store
        self._device, self._host = device.queue(name), device.host_queue(name)
        self._address = address
        self._instance = instance
        self._limits = limits
        self._departures = departures
        self._elsewhere = elsewhere
        self._wall_clock = wall_clock

    @property
    def may_go_elsewhere(self) -> bool:
        """Whether it ends with NOT_OWNER where another server should own the policy, though none does."""
        return self._elsewhere is not None

    @property
    def seconds(self) -> float:
        """How long it has been under way."""
        return time.monotonic() - self.started

    def not_yet(self) -> ServiceError:
        """What a caller is told who cannot wait longer."""
        if self.trouble is not None:
            return store_down(str(self.trouble))
        return loading(self.name, replayed=self.replayed, entries=self.entries)

    async def run(self) -> Loaded:
        """The policy.

        Raises ServiceError: POLICY_NOT_FOUND, NOT_OWNER, DEVICE_FULL, STATE_STORE_DOWN, STATE_DAMAGED, POLICY_TOO_NEW.
        """
        try:
            owner = await self._acquire()
        except OwnedElsewhere as error:
            raise not_owner(self.name, error.address) from error
        except NotFound as error:
            raise policy_not_found(self.name) from error
        except StoreError as error:
            raise store_failed(error) from error
        self.uid = owner.uid
        try:
            return await self._load(owner)
        except NotFound as error:
            await self._release(owner)
            raise policy_not_found(self.name) from error
        except StoreError as error:
            await self._release(owner)
            raise store_failed(error) from error
        except BaseException:  # such as no room on the device: another server may have some
            await self._release(owner)
            raise

    async def _acquire(self) -> Ownership:
        """The right to write the policy; an owner that leaves gives it up in a moment, and takes nobody who asks it."""
        while True:
            try:
                return await self._store.acquire(
                    self.name,
                    address=self._address,
                    instance=self._instance,
                    elsewhere=self._find_place if self._elsewhere else None,
                )
            except OwnedElsewhere as error:
                if not error.leaving:
                    raise
            await self._departures.wait(self.name)

    async def _find_place(self) -> str:
        stored = await self._store.get(self.name)
        return await self._elsewhere(self._spec(stored)) if stored and self._elsewhere else ""

    def _spec(self, stored: StoredPolicy) -> PolicySpec:
        """What is stored, if this release knows the rule and its settings."""
        spec = PolicySpec.from_json(stored.spec)
        try:
            build(spec.rule, spec.settings)
        except RuleError as error:
            detail = f"policy {self.name!r} was created by a newer release: {error}"
            raise too_new(detail, found=FORMAT, readable=FORMAT) from error
        return spec

    async def _load(self, owner: Ownership) -> Loaded:
        await self._read(lambda: self._store.confirm(owner))  # what is in the log from here on counts as durable
        stored = await self._read(lambda: self._store.get(self.name))
        if stored is None or stored.uid != owner.uid:
            raise NotFound(self.name)
        spec = self._spec(stored)
        header = Header.from_fields(await self._read(lambda: self._store.read_header(owner)))
        self.entries = (await self._read(lambda: self._store.log_state(owner))).entries
        policy = await self._empty(spec, stored.uid)
        try:
            versions = await self._read_pages(owner, policy)
            await self._device.run_slices(policy.load(header, versions))
            record, tail = await self._replay(owner, policy)
        except BaseException:  # which may keep what was loaded alive for as long as anybody looks at it
            await self._device.run(policy.drop)
            raise
        policy.trainers.wake(self._wall_clock())
        log.info(
            "loaded",
            policy=self.name,
            version=policy.version,
            epoch=owner.epoch,
            pages=len(versions),
            entries=self.replayed,
            seconds=round(self.seconds, 3),
        )
        return Loaded(policy=policy, stored=stored, record=record, tail=tail, device=self._device, host=self._host)

    async def _empty(self, spec: PolicySpec, uid: str) -> Policy:
        check_room(spec, self._device.device)
        rule = build(spec.rule, spec.settings)
        state = await self._device.run_slices(rule.init_slices(spec.num_examples, device=self._device.device))
        return Policy(
            spec, uid, rule=rule, state=state, trainers=Trainers(self._limits.trainer_idle_s, self._limits.max_trainers)
        )

    async def _read_pages(self, owner: Ownership, policy: Policy) -> dict[int, int]:
        versions: dict[int, int] = {}
        manifest = await self._read(lambda: self._store.manifest(owner))
        self.pages = await self._read(lambda: self._store.num_pages(owner))
        for index in range(self.pages):
            read = partial(self._store.read_page, owner, index, version=manifest.get(index))
            page = await self._read(read)
            if page is not None:
                await self._device.run(lambda i=index, p=page: tables.load_page(policy.state, i, p.columns))  # type: ignore[misc]
                versions[index] = page.version
            self.read_pages += 1
        return versions

    async def _replay(self, owner: Ownership, policy: Policy) -> tuple[StoreRecord, LogTail]:
        record: StoreRecord | None = None
        tail = LogTail(policy.version)
        async for chunk in self._chunks(owner):
            if record is None:
                tail = LogTail(chunk[0].version - 1)
                record = StoreRecord(owner=owner, base=tail.base, durable_version=tail.base)
            replay_s = await self._device.run_slices(policy.replay(chunk))
            size = sum(tail.add(entry, replay_s=replay_s / len(chunk)) for entry in chunk)
            record.appended(chunk[-1].version, size=size, replay_s=replay_s)
            if tail.size > self._limits.max_backlog_bytes:
                tail.forget(record.durable_version)
            self.replayed += len(chunk)
        return record or StoreRecord(owner=owner, base=policy.version, durable_version=policy.version), tail

    async def _chunks(self, owner: Ownership) -> AsyncIterator[list[LogEntry]]:
        """The log in pieces; a store that does not answer in between is asked again for what is missing."""
        count, last, before = 1, 0, 0
        while True:
            read = partial(self._store.read_log_chunk, owner, after=last, count=count, first=last == 0, before=before)
            chunk, following = await self._read(read)
            if chunk:
                yield chunk
                last, before = chunk[-1].version, checksum(chunk[-1])
            if len(chunk) < count:
                return
            count = following

    async def _read(self, read: Callable[[], Awaitable[T]]) -> T:
        """What the store answers, asked again for a while when it does not."""
        give_up, backoff_s = time.monotonic() + READ_RETRIES_S, FIRST_BACKOFF_S
        while True:
            try:
                answer = await read()
            except Unavailable as error:
                if time.monotonic() > give_up:
                    raise
                if self.trouble is None:
                    log.warning("redis does not answer: loading waits", policy=self.name, error=str(error))
                self.trouble = error
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
            else:
                self.trouble = None
                return answer

    async def _release(self, owner: Ownership) -> None:
        """Goes on when the loading is cancelled once more."""
        with suppress(StoreError):
            await asyncio.shield(self._store.release(owner))
