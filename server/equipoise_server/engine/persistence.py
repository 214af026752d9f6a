"""How a policy in service is kept in the store: its log, its sweeps, and whose it is."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import structlog

from equipoise_server.engine.limits import EngineLimits
from equipoise_server.engine.loading import Loaded
from equipoise_server.engine.log import LogWriter, StoreRecord
from equipoise_server.engine.memory import Backlogs
from equipoise_server.engine.snapshot import read_pages
from equipoise_server.engine.sweep import sweep
from equipoise_server.engine.telemetry import Telemetry
from equipoise_server.errors import ServiceError, fenced, policy_deleted
from equipoise_server.store import Fence, Fenced, LogLost, Ownership, Page, RedisStore, StoreError

log = structlog.get_logger("equipoise.policy")

LOG_ROOM = 2
"""Steps wait for a sweep while the log is so many times as long as its rule wants it."""
SWEEP_RETRY_S = 1.0
"""Pause after a sweep that the store ended."""
FINAL_REPLAY_S = 0.1
"""A policy that stops in order writes its pages when the replay of its log would take longer than this."""


class Persistence:
    """Keeps one policy in the store. `write` and `sweep_when_due` are tasks of its runner.

    Attributes:
        log: writer of the log, with the record of what the store holds.
    """

    def __init__(
        self, loaded: Loaded, *, store: RedisStore, limits: EngineLimits, backlogs: Backlogs, telemetry: Telemetry
    ) -> None:
        self._policy = loaded.policy
        self._stored = loaded.stored
        self._store = store
        self._device = loaded.device
        self._limits = limits
        self._telemetry = telemetry
        self._max_log_bytes = loaded.policy.rule.max_log_bytes(loaded.policy.state)
        self._table_bytes = loaded.policy.state.nbytes
        self._sweeping = asyncio.Lock()
        self._page_written = asyncio.Event()
        self._asking: set[asyncio.Future[list[Fence]]] = set()
        self.log = LogWriter(
            store,
            loaded.record,
            tail=loaded.tail,
            log_timeout_s=limits.log_timeout_s,
            backlogs=backlogs,
            telemetry=telemetry,
            republish=self._republish,
            on_rollback=self._distrust_pages,
            is_long=self._log_is_long,
        )

    @property
    def owner(self) -> Ownership:
        """The right to write the policy."""
        return self.log.record.owner

    async def write(self) -> None:
        """Writes the log until cancelled. Raises ServiceError (FENCED, POLICY_DELETED) once the policy is lost."""
        try:
            await self.log.run()
        except Fenced as error:
            raise self.lost(await self.check_fence() or Fence.FENCED) from error
        finally:
            self.log.end()

    async def sweep_when_due(self) -> None:
        """Sweeps until cancelled, whenever the log has become long."""
        while True:
            await self.log.long.wait()
            try:
                await self.sweep()
            except StoreError as error:
                if isinstance(error, LogLost):
                    self.log.lose(error.last_version)
                log.warning("a sweep did not end", policy=self._policy.spec.name, error=str(error))
                self._telemetry.swept(ok=False)
                await asyncio.sleep(SWEEP_RETRY_S)

    async def sweep(self, *, bytes_per_s: float | None = None) -> None:
        """Writes changed pages and trims the log, now; one sweep at a time."""
        started = asyncio.get_running_loop().time()
        async with self._sweeping:
            try:
                swept = await sweep(
                    self._policy,
                    log=self.log,
                    store=self._store,
                    device=self._device,
                    bytes_per_s=bytes_per_s or self._limits.sweep_bytes_per_s,
                    on_page=self._page_written.set,
                )
            finally:
                self._page_written.set()
        self._telemetry.swept(ok=True)
        seconds = round(asyncio.get_running_loop().time() - started, 3)
        through = self.log.record.base
        log.info("swept", policy=self._policy.spec.name, pages=swept, through_version=through, seconds=seconds)

    async def room(self) -> None:
        """Returns when a step may be applied: soon, unless the store is slow, or a sweep shortens a long log.

        The rule says how long is long; the steps wait for the sweep only as long as it gets on.
        """
        await self.log.room()
        most, record = self._max_log_bytes, self.log.record
        while most and record.log_bytes > LOG_ROOM * most and self._sweeping.locked() and not self.log.failing:
            self._page_written.clear()
            try:
                async with asyncio.timeout(self._limits.log_timeout_s):
                    await self._page_written.wait()
            except TimeoutError:
                return

    async def finish(self, *, timeout_s: float) -> None:
        """Writes everything, and pages too where the log is long, for so many seconds; the sweeper has ended."""
        end = asyncio.get_running_loop().time() + timeout_s
        if await self.check_fence() is Fence.FORGOTTEN:  # nobody else would notice: there is nothing to append
            self.log.lose(None)
        if not await self.log.flush(timeout_s=end - asyncio.get_running_loop().time()):
            name, versions = self._policy.spec.name, self.log.backlog
            log.warning("stopped before redis had everything", policy=name, versions=versions)
        elif self.log.record.log_replay_s > FINAL_REPLAY_S:
            with suppress(TimeoutError, StoreError):
                async with asyncio.timeout_at(end):
                    await self.sweep(bytes_per_s=float("inf"))

    async def check_fence(self) -> Fence | None:
        """Whose the policy is; None: the store does not tell within `log_timeout_s`."""
        asking = asyncio.ensure_future(self._store.check_fences([self.owner]))
        self._asking.add(asking)
        asking.add_done_callback(self._asked)
        await asyncio.wait([asking], timeout=self._limits.log_timeout_s)
        return asking.result()[0] if asking.done() and asking.exception() is None else None

    def _asked(self, asking: "asyncio.Future[list[Fence]]") -> None:
        self._asking.discard(asking)
        if not asking.cancelled():
            asking.exception()  # a store that does not answer is no news

    def lost(self, found: Fence) -> ServiceError:
        """Why the policy cannot be served here any more."""
        name = self._policy.spec.name
        deleted = found is Fence.DELETED
        told = "the policy was deleted" if deleted else "another server owns the policy now"
        log.warning(told, policy=name, epoch=self.owner.epoch)
        return policy_deleted(name) if deleted else fenced(name)

    async def release(self) -> None:
        """Leaves the policy to any server that is asked for it; a store that does not answer finds out by time."""
        with suppress(StoreError):
            await self._store.release(self.owner)

    def _log_is_long(self, record: StoreRecord) -> bool:
        max_bytes = self._max_log_bytes or max(self._limits.sweep_min_bytes, self._table_bytes)
        return record.log_bytes > max_bytes or record.log_replay_s > self._limits.max_replay_s

    async def _republish(self, on_page: Callable[[], None]) -> tuple[Ownership, int]:
        """Writes everything anew, as of one version."""
        name = self._policy.spec.name
        log.warning("writing the whole policy to redis again", policy=name, version=self._policy.version)
        snapshot = await self._device.run(self._policy.snapshot)
        version = snapshot.header.version

        async def pages() -> AsyncIterator[tuple[int, Page]]:
            async for index, page in read_pages(snapshot, self._device, version=version):
                yield index, page
                on_page()

        try:
            renewed = await self._store.republish(
                self.owner, self._stored, version=version, pages=pages(), header=snapshot.header.to_fields()
            )
        finally:
            self._policy.close_snapshot(snapshot)
        self._policy.stored_at[:] = version
        log.info("redis has the whole policy again", policy=name, version=version)
        return renewed, version

    def _distrust_pages(self) -> None:
        self._policy.stored_at[:] = -1
