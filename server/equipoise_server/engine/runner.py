"""A policy in service: its queue, its turn on the device, its log, its sweeps and its trainers' sessions."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import structlog

from equipoise_server.engine.device import DeviceThread, is_device_fault
from equipoise_server.engine.durable import DurableSequences
from equipoise_server.engine.log import LogTail, LogWriter
from equipoise_server.engine.policy import Policy, PolicyStatus
from equipoise_server.engine.queue import Pending, QueueLimits, StepQueue
from equipoise_server.engine.session import Session
from equipoise_server.engine.snapshot import Snapshot
from equipoise_server.engine.spec import Durability
from equipoise_server.engine.step import Answer, Kind, Outcome, Step
from equipoise_server.engine.sweep import SweepLimits, sweep
from equipoise_server.engine.telemetry import Telemetry
from equipoise_server.errors import Code, ServiceError, fenced, policy_deleted
from equipoise_server.store import Fenced, LogEntry, Ownership, RedisStore, StoredPolicy, StoreError

T = TypeVar("T")

log = structlog.get_logger("equipoise.policy")

LOG_ROOM = 2
"""Where a rule says how long its log should get: at so many times that, steps wait for the sweep to shorten it."""
SWEEP_RETRY_S = 1.0
"""Pause after a sweep that the store ended."""
STEPS_PER_CALL = 64
"""Most steps applied in one device call, so that answers are not held back for too long."""

SHORT_CALL_ROWS = 8192
"""Steps with at most so many rows together take well under a millisecond on a CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerLimits:
    """Bounds of one policy's service.

    Attributes:
        queue: what may wait.
        log_timeout_s: how long an answer waits for the log.
        max_backlog_bytes: log kept in memory before the tables themselves are written again.
        sweep: when to sweep and how fast.
    """

    queue: QueueLimits
    log_timeout_s: float
    max_backlog_bytes: int
    sweep: SweepLimits


class PolicyRunner:
    """Runs one policy. Created by the engine; for one event loop."""

    def __init__(
        self,
        policy: Policy,
        owner: Ownership,
        stored: StoredPolicy,
        *,
        tail: LogTail,
        store: RedisStore,
        device: DeviceThread,
        limits: RunnerLimits,
        telemetry: Telemetry,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.policy = policy
        self.stored = stored
        self.status: PolicyStatus = policy.status()
        """The picture after the last device call."""
        self.changed: set[asyncio.Event] = set()
        """Events of watchers, set whenever the status changes."""
        self._store = store
        self._device = device
        self._limits = limits
        self._telemetry = telemetry
        self._wall_clock = wall_clock
        self._loop = asyncio.get_running_loop()
        self.queue = StepQueue(limits.queue, clock=self._loop.time)
        self.log = LogWriter(
            store,
            owner,
            tail=tail,
            log_timeout_s=limits.log_timeout_s,
            max_backlog_bytes=limits.max_backlog_bytes,
            telemetry=telemetry,
            republish=self._republish,
            on_rollback=self._distrust_pages,
        )
        self._max_log_bytes = policy.rule.max_log_bytes(policy.state)
        self._sweeping = False
        self._page_written = asyncio.Event()
        self._sequences = DurableSequences(
            durable={key: trainer.last_sequence for key, trainer in policy.trainers.known.items()}
        )
        self.sessions: dict[str, Session] = {}
        self._used_at = self._loop.time()
        self.closed: ServiceError | None = None
        """Why nothing is taken any more."""
        self._tasks = [self._loop.create_task(self._run()), self._loop.create_task(self._sweep_when_due())]
        self._tasks.append(self._loop.create_task(self._write_log()))
        self._on_closed: list[Callable[[], None]] = []
        self._asking: set[asyncio.Task[None]] = set()
        self._vacant = asyncio.Event()
        self._vacant.set()

    @property
    def spec_name(self) -> str:
        """Name of the policy."""
        return self.policy.spec.name

    @property
    def epoch(self) -> int:
        """Epoch of this ownership."""
        return self.log.owner.epoch

    def durable_sequence(self, trainer_id: str) -> int:
        """All steps of the trainer up to this sequence are in the store."""
        return self._sequences.get(trainer_id, durable_version=self.log.durable_version)

    def idle_for(self) -> float:
        """Seconds since anybody used the policy; 0 while a stream is open or someone watches."""
        return 0.0 if self.sessions or self.changed else self._loop.time() - self._used_at

    def on_closed(self, call: Callable[[], None]) -> None:
        """Calls back when this runner has stopped taking steps."""
        self._on_closed.append(call)

    async def open(self, trainer_id: str) -> tuple[Session, Answer]:
        """Opens a stream for a trainer, after all it has sent so far; an older stream of the trainer ends."""
        if before := self.sessions.get(trainer_id):
            message = f"trainer {trainer_id!r} opened another stream; this one ends"
            before.end(ServiceError(Code.ABORTED, "TRAINER_REPLACED", message))
        session = self.sessions[trainer_id] = Session(trainer_id)
        self._vacant.clear()
        try:
            await self.verify()
            self._check_open()
            here = self.sessions.keys() - {trainer_id}
            for idle in await self._device.run(lambda: self.policy.trainers.forget_idle(self._wall_clock(), here=here)):
                self._sequences.forget(idle)
            opening = Step(kind=Kind.READ, trainer_id=trainer_id, wants_weights=False)
            answer = await (await self.submit(opening))
            if not answer.last_sequence:
                self._sequences.forget(trainer_id)
            return session, answer
        except BaseException:
            self.close_session(session)
            raise

    def close_session(self, session: Session) -> None:
        """The stream has ended."""
        if self.sessions.get(session.trainer_id) is session:
            del self.sessions[session.trainer_id]
        if not self.sessions:
            self._vacant.set()

    async def submit(self, step: Step) -> asyncio.Future[Answer]:
        """Queues a step when there is room; the future holds its answer once it may be sent."""
        self._check_open()
        return await self.queue.put(step)

    def submit_now(self, step: Step) -> asyncio.Future[Answer]:
        """Queues a step. Raises ServiceError (QUEUE_FULL) when there is no room."""
        self._check_open()
        return self.queue.put_now(step, policy=self.spec_name)

    async def read(self, call: Callable[[Policy], T]) -> T:
        """What `call` reads from the policy between two device calls."""
        self._check_open()
        return await self._device.run(lambda: call(self.policy))

    def drain(self) -> None:
        """Asks every stream to reconnect elsewhere."""
        for session in self.sessions.values():
            session.on_drain()

    async def close(self, error: ServiceError) -> None:
        """Takes nothing any more and ends every stream with `error`; what was applied is not flushed."""
        self._shut(error)
        others = [task for task in (*self._tasks, *self._asking) if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def verify(self) -> None:
        """Closes if another server has acquired the policy since; returns before it is known if the store stalls."""
        asking = self._loop.create_task(self._ask_whether_owned())
        self._asking.add(asking)
        asking.add_done_callback(self._asking.discard)
        await asyncio.wait([asking], timeout=self._limits.log_timeout_s)

    async def hand_over(self, error: ServiceError, *, flush_timeout_s: float) -> None:
        """Waits until the last stream has ended, then gives the policy up."""
        await self._vacant.wait()
        await self.give_up(error, flush_timeout_s=flush_timeout_s)

    async def give_up(self, error: ServiceError, *, flush_timeout_s: float) -> None:
        """Writes what is not in the store yet, closes, and leaves the policy to any server that is asked for it."""
        if self.closed is not None:
            return
        self._shut(error)
        await self._device.run(lambda: None)  # what is being applied comes first
        await self.log.flush(timeout_s=flush_timeout_s)
        await self.close(error)
        await self.release()

    async def release(self) -> None:
        """Leaves the policy to any server that is asked for it; a store that does not answer finds out by time."""
        with suppress(StoreError):
            await self._store.release(self.log.owner)

    async def deleted(self) -> None:
        """The policy is gone from the store."""
        await self.close(policy_deleted(self.spec_name))

    def _check_open(self) -> None:
        self._used_at = self._loop.time()
        if self.closed is not None:
            raise self.closed

    def _shut(self, error: ServiceError) -> None:
        if self.closed is None:
            self.closed = error
            for session in list(self.sessions.values()):
                session.end(error)
            self.queue.fail(error)
            for call in self._on_closed:
                call()
        for event in self.changed:
            event.set()

    async def _run(self) -> None:
        while True:
            taken = await self.queue.take()
            for start in range(0, len(taken), STEPS_PER_CALL):
                await self._room_in_log()
                try:
                    await self._apply(taken[start : start + STEPS_PER_CALL])
                except ServiceError as error:
                    await self._abandon(taken[start:], error)

    async def _abandon(self, unanswered: list[Pending], error: ServiceError) -> None:
        """The device failed: the tables here are not to be trusted, those in the store are."""
        log.error("the device failed; the policy leaves memory", policy=self.spec_name, error=str(error))
        self._telemetry.rejected(reason=error.reason)
        for pending in unanswered:
            if not pending.answer.done():
                pending.answer.set_exception(error)
        await self.close(error)

    async def _room_in_log(self) -> None:
        """Waits while a sweep shortens a log that is too long for its rule, but only as long as it gets on."""
        most = self._max_log_bytes
        while most and self.log.tail.size > LOG_ROOM * most and self._sweeping and not self.log.failing:
            self._page_written.clear()
            try:
                async with asyncio.timeout(self._limits.log_timeout_s):
                    await self._page_written.wait()
            except TimeoutError:
                return

    async def _apply(self, batch: list[Pending]) -> None:
        started = self._loop.time()
        short = not self.policy.rule.touches_all_rows and sum(p.step.num_rows for p in batch) <= SHORT_CALL_ROWS
        results, status = await self._device.run(lambda: self._apply_on_device(batch), short=short)
        seconds = self._loop.time() - started
        self.status = status
        self._telemetry.batch(steps=len(batch))
        for pending, (result, entry) in zip(batch, results, strict=True):
            if entry is not None and pending.step.sequence:
                self._sequences.add(pending.step.trainer_id, version=entry.version, sequence=pending.step.sequence)
            self._telemetry.stage(method="Exchange", stage="queue", seconds=started - pending.since)
            self._telemetry.stage(method="Exchange", stage="compute", seconds=seconds)
            self._answer(pending, result)
        self.log.add([entry for _, entry in results if entry is not None])  # answers that need not wait go first
        for event in self.changed:
            event.set()

    def _apply_on_device(
        self, batch: list[Pending]
    ) -> tuple[list[tuple[Answer | Exception, LogEntry | None]], PolicyStatus]:
        now = self._wall_clock()
        results: list[tuple[Answer | Exception, LogEntry | None]] = []
        # evidence of a step that is followed by another in the same call would never be seen
        last = max((position for position, pending in enumerate(batch) if pending.step.kind is Kind.STEP), default=0)
        for position, pending in enumerate(batch):
            try:
                results.append(self.policy.apply(pending.step, now=now, with_evidence=position == last))
            except Exception as error:  # a bug or a gap concerns its own step only
                if is_device_fault(error):
                    raise
                results.append((error, None))
        return results, self.policy.status()

    def _answer(self, pending: Pending, result: Answer | Exception) -> None:
        if isinstance(result, Exception):
            if not pending.answer.done():
                pending.answer.set_exception(result)
            return
        step, applied_at = pending.step, self._loop.time()
        self._telemetry.step(policy=self.spec_name, outcome=result.outcome.name.lower(), rows=step.num_rows)

        def release() -> None:
            self._telemetry.stage(method="Exchange", stage="log", seconds=self._loop.time() - applied_at)
            if not pending.answer.done():  # done: the caller has gone
                pending.answer.set_result(result)

        if result.outcome is Outcome.READ or self.policy.spec.durability is Durability.BEHIND:
            release()
        else:
            self.log.when_durable(result.version, release)

    async def _write_log(self) -> None:
        try:
            await self.log.run()
        except Fenced:
            await self._fenced()

    async def _ask_whether_owned(self) -> None:
        with suppress(StoreError):
            if not await self._store.holds(self.log.owner):
                await self._fenced()

    async def _fenced(self) -> None:
        log.warning("another server owns the policy now", policy=self.spec_name, epoch=self.epoch)
        await self.close(fenced(self.spec_name))

    async def _sweep_when_due(self) -> None:
        most = self._max_log_bytes or max(self._limits.sweep.min_bytes, self.status.table_bytes)
        while True:
            await self.log.wait_longer_than(most)
            try:
                await self.sweep()
            except StoreError:  # the log writer deals with the store; the pages are dirty again
                await asyncio.sleep(SWEEP_RETRY_S)

    async def sweep(self) -> None:
        """Writes changed pages and trims the log, now."""
        started = self._loop.time()
        self._sweeping = True
        try:
            swept = await sweep(
                self.policy,
                log=self.log,
                store=self._store,
                owner=self.log.owner,
                device=self._device,
                bytes_per_s=self._limits.sweep.bytes_per_s,
                on_page=self._page_written.set,
            )
        finally:
            self._sweeping = False
            self._page_written.set()
        seconds = round(self._loop.time() - started, 3)
        log.info("swept", policy=self.spec_name, pages=swept, through_version=self.log.tail.base, seconds=seconds)

    async def _republish(self) -> tuple[Ownership, int]:
        snapshot = await self._device.run(lambda: Snapshot.of(self.policy))
        version = snapshot.facts.progress.version
        log.warning("redis has lost the policy: writing it again", policy=self.spec_name, version=version)
        renewed = await self._store.republish(
            self.log.owner,
            self.stored,
            version=version,
            pages=snapshot.pages(),
            progress=snapshot.facts.to_fields(),
        )
        return renewed, version

    def _distrust_pages(self) -> None:
        log.warning("redis went back: it lacks what was acknowledged", policy=self.spec_name)
        self.policy.dirty_pages[:] = True
