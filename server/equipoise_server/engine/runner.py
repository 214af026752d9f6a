"""A policy in service: its queue, its use of the device, its log, its sweeps and its trainers' sessions."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from enum import Enum
from typing import Any, TypeVar

import structlog

from equipoise_server import logs
from equipoise_server.engine.device import DeviceThread, is_device_fault
from equipoise_server.engine.limits import EngineLimits
from equipoise_server.engine.loading import Loaded
from equipoise_server.engine.log import LogWriter
from equipoise_server.engine.policy import Policy, Taken
from equipoise_server.engine.queue import Pending, StepQueue
from equipoise_server.engine.session import DurableSequences, Session
from equipoise_server.engine.snapshot import Snapshot
from equipoise_server.engine.spec import Durability
from equipoise_server.engine.status import PolicyStatus
from equipoise_server.engine.step import Answer, Kind, Outcome, Step
from equipoise_server.engine.sweep import sweep
from equipoise_server.engine.telemetry import Telemetry
from equipoise_server.errors import Code, ServiceError, draining, fenced, internal, policy_deleted
from equipoise_server.rules import Slices
from equipoise_server.store import Fence, Fenced, Ownership, Page, RedisStore, StoreError

T = TypeVar("T")

log = structlog.get_logger("equipoise.policy")

LOG_ROOM = 2
"""Where a rule says how long its log should get: at so many times that, steps wait for the sweep to shorten it."""
SWEEP_RETRY_S = 1.0
"""Pause after a sweep that the store ended."""
DRAIN_REPLAY_S = 0.1
"""A policy that stops in order writes its pages when the replay of its log would take longer than this."""
STEPS_PER_CALL = 64
"""Most steps applied in one device call, so that answers are not held back for too long."""
CALL_S = 0.005
"""How long steps are applied in one device call, unless a single one takes longer."""
SHORT_CALL_STEPS, SHORT_CALL_ROWS, SHORT_CALL_S = 8, 8192, 0.002
"""So few steps with so few rows together are applied on the event loop, for so long."""
SNAPSHOT_BYTES = 2 << 20
"""Bytes of a snapshot's pages that are read in one device call."""


class State(Enum):
    """Where a policy in service stands; before it, it is `Loading`."""

    SERVING = "serving"
    DRAINING = "draining"
    """Takes no new streams; once they have left, what was applied is written."""
    CLOSED = "closed"


class PolicyRunner:
    """Runs one policy: a group of tasks with one way to end, `stop`. Created by the engine; for one event loop.

    A task that ends by itself ends the policy: with its ServiceError, or else, since that is a bug, with INTERNAL and
    an opaque id under which the log tells what happened. The policy comes back from the store when it is next touched.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        store: RedisStore,
        device: DeviceThread,
        limits: EngineLimits,
        telemetry: Telemetry,
        on_closed: Callable[["PolicyRunner"], None],
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        policy = loaded.policy
        self.policy = policy
        self.stored = loaded.stored
        self.state = State.SERVING
        self.status: PolicyStatus = policy.status()
        """The picture after the last device call."""
        self.changed: set[asyncio.Event] = set()
        """Events of watchers, set whenever the status changes."""
        self.sessions: dict[str, Session] = {}
        self._store = store
        self._device = device
        self._limits = limits
        self._telemetry = telemetry
        self._on_closed = on_closed
        self._wall_clock = wall_clock
        self._loop = asyncio.get_running_loop()
        self.queue = StepQueue(
            policy.spec.name,
            max_steps=limits.max_queued_steps,
            max_bytes=limits.max_queued_bytes,
            clock=self._loop.time,
        )
        self._max_log_bytes = policy.rule.max_log_bytes(policy.state)
        self._table_bytes = policy.state.nbytes
        self.log = LogWriter(
            store,
            loaded.record,
            tail=loaded.tail,
            log_timeout_s=limits.log_timeout_s,
            max_backlog_bytes=limits.max_backlog_bytes,
            telemetry=telemetry,
            republish=self._republish,
            on_rollback=self._distrust_pages,
            is_long=self._log_is_long,
        )
        self._sweeping = False
        self._page_written = asyncio.Event()
        self._sequences = DurableSequences(
            durable={key: trainer.last_sequence for key, trainer in policy.trainers.known.items()}
        )
        self._used_at = self._loop.time()
        self._vacant = asyncio.Event()
        self._vacant.set()
        self._stopping: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._applying = self._start(self._apply_steps())
        self._writer = self._start(self._write_log())
        self._sweeper = self._start(self._sweep_when_due())

    @property
    def spec_name(self) -> str:
        """Name of the policy."""
        return self.policy.spec.name

    @property
    def epoch(self) -> int:
        """Epoch of this ownership."""
        return self.owner.epoch

    @property
    def owner(self) -> Ownership:
        """The right to write the policy."""
        return self.log.record.owner

    @property
    def closed(self) -> ServiceError | None:
        """Why nothing is taken any more."""
        return self.queue.closed

    def durable_sequence(self, trainer_id: str) -> int:
        """All steps of the trainer up to this sequence are in the store."""
        return self._sequences.get(trainer_id, durable_version=self.log.record.durable_version)

    def is_idle(self, idle_s: float) -> bool:
        """Whether nobody has used the policy for so long, and all of it is in the store."""
        used = self.sessions or self.changed or self.queue.is_busy or self.policy.has_snapshots or self.log.is_behind
        return not used and self._loop.time() - self._used_at > idle_s

    # What callers ask for.

    async def open(self, trainer_id: str) -> tuple[Session, Answer]:
        """Opens a stream for a trainer, after all it has sent so far; an older stream of the trainer ends."""
        self._check_open()
        if self.state is not State.SERVING:
            raise draining()
        if before := self.sessions.get(trainer_id):
            message = f"trainer {trainer_id!r} opened another stream; this one ends"
            before.end(ServiceError(Code.ABORTED, "TRAINER_REPLACED", message))
        session = self.sessions[trainer_id] = Session(trainer_id)
        self._vacant.clear()
        try:
            await self.check_fence()
            here = self.sessions.keys() - {trainer_id}
            for idle in await self.read(lambda policy: policy.trainers.forget_idle(self._wall_clock(), here=here)):
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
        return self.queue.put_now(step)

    async def read(self, call: Callable[[Policy], T]) -> T:
        """What `call` reads from the policy between two device calls."""
        self._check_open()
        return await self._device.run(lambda: call(self._here()))

    async def read_slices(self, slices: Slices[T]) -> T:
        """What long work reads, for example of a snapshot; steps go on between two pieces."""
        self._check_open()
        return await self._device.run_slices(slices)

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[Snapshot]:
        """The policy of now, for reading while steps go on."""
        snapshot = await self.read(lambda policy: policy.snapshot())
        try:
            yield snapshot
        finally:
            self.policy.close_snapshot(snapshot)

    async def pages(self, snapshot: Snapshot, *, version: int) -> AsyncIterator[tuple[int, Page]]:
        """A snapshot's pages, each once, said to be of a version."""
        async for numbered in self._snapshot_pages(snapshot, version):
            self._check_open()
            yield numbered

    async def _snapshot_pages(self, snapshot: Snapshot, version: int) -> AsyncIterator[tuple[int, Page]]:
        page_bytes = max(1, self._table_bytes // max(snapshot.num_pages, 1))
        step = max(1, SNAPSHOT_BYTES // page_bytes)

        def take(indices: range) -> list[Page]:
            pages = [snapshot.page(index, version=version) for index in indices]
            for index in indices:
                snapshot.release(index)
            return pages

        for start in range(0, snapshot.num_pages, step):
            indices = range(start, min(start + step, snapshot.num_pages))
            for index, page in zip(indices, await self._device.run(lambda i=indices: take(i)), strict=True):  # type: ignore[misc]
                yield index, page

    async def check_fence(self) -> None:
        """Ends the policy here if it is another server's or was deleted; returns unknowing if the store stalls."""
        checking = self._loop.create_task(self._check_fence())
        await asyncio.wait([checking], timeout=self._limits.log_timeout_s)
        self._check_open()

    def fence(self, found: Fence) -> None:
        """The store has told how the ownership stands."""
        if found is not Fence.HELD and self._stopping is None:
            log.warning("the policy is not ours any more", policy=self.spec_name, epoch=self.epoch, why=found.value)
            self._begin_stop(self._lost(found))

    # The end.

    def drain(self) -> None:
        """Asks every stream to reconnect elsewhere, and takes no more of them."""
        self.state = State.DRAINING
        for session in self.sessions.values():
            session.on_drain()

    async def hand_over(self, error: ServiceError, *, flush_timeout_s: float) -> None:
        """Waits until the last stream has ended, then stops."""
        await self._vacant.wait()
        await self.stop(error, flush_timeout_s=flush_timeout_s)

    async def stop(self, error: ServiceError, *, flush_timeout_s: float = 0.0) -> None:
        """Ends the service: the one way, whoever asks first. Returns when all is over.

        Nothing is taken any more. With `flush_timeout_s` what was applied is written first, for so long at most, and
        pages where the log is long. Then every step that was ever taken is answered, with `error` where it has no
        answer of its own; streams end with `error`; the tables leave memory, and the policy is left to any server.
        """
        self._begin_stop(error, flush_timeout_s=flush_timeout_s)
        assert self._stopping is not None
        await asyncio.shield(self._stopping)

    async def wait_closed(self, *, timeout_s: float) -> None:
        """Returns once a policy that is being stopped has left memory; raises why it is stopped when it has not."""
        if self._stopping is not None:
            await asyncio.wait([self._stopping], timeout=timeout_s)
        if self.state is not State.CLOSED and self.closed is not None:
            raise self.closed

    def _begin_stop(self, error: ServiceError, *, flush_timeout_s: float = 0.0) -> None:
        if self._stopping is None:
            self.state = State.DRAINING
            self.queue.refuse(error)
            self._stopping = self._loop.create_task(self._stop(error, flush_timeout_s))

    async def _stop(self, error: ServiceError, flush_timeout_s: float) -> None:
        try:
            if flush_timeout_s:
                await self._flush(flush_timeout_s)
        except Exception:
            log.exception("not everything was written", policy=self.spec_name)
        finally:
            self.log.end()
            self.queue.close(error)
            for session in list(self.sessions.values()):
                session.end(error)
            for event in self.changed:
                event.set()
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            with suppress(ServiceError):  # a device that failed has nothing to drop
                await self._device.run(self.policy.drop)
            with suppress(StoreError):  # a store that does not answer finds out by time
                await self._store.release(self.owner)
            self.state = State.CLOSED
            self._on_closed(self)

    async def _flush(self, timeout_s: float) -> None:
        end = self._loop.time() + timeout_s
        await asyncio.wait([self._applying], timeout=timeout_s)  # what is being applied comes first
        self._sweeper.cancel()
        await asyncio.wait([self._sweeper])
        if not await self.log.flush(timeout_s=timeout_s):
            log.warning("stopped before redis had everything", policy=self.spec_name, versions=self.log.backlog)
        elif self.log.record.log_replay_s > DRAIN_REPLAY_S:
            with suppress(TimeoutError, StoreError):
                async with asyncio.timeout(end - self._loop.time()):
                    await self.sweep(bytes_per_s=float("inf"))

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task is self._writer:
            self.log.end()
        if not task.cancelled() and (error := task.exception()) is not None:
            self._begin_stop(self._reason(error))

    def _reason(self, error: BaseException) -> ServiceError:
        """What ends the policy when one of its tasks ends with an error."""
        if isinstance(error, ServiceError):
            if error.reason == "DEVICE_LOST":
                log.error("the device failed; the policy leaves memory", policy=self.spec_name, error=str(error))
                self._telemetry.rejected(reason=error.reason)
            return error
        error_id = logs.new_id()
        log.error(
            "unexpected error; the policy leaves memory", policy=self.spec_name, error_id=error_id, exc_info=error
        )
        return internal(error_id)

    def _check_open(self) -> None:
        self._used_at = self._loop.time()
        if self.closed is not None:
            raise self.closed

    def _here(self) -> Policy:
        """The policy, unless its tables have left memory while a call waited for the device."""
        if self.closed is not None:
            raise self.closed
        return self.policy

    # Steps.

    async def _apply_steps(self) -> None:
        while batch := await self.queue.take(STEPS_PER_CALL):
            while batch and self.closed is None:
                await self.log.room()
                await self._room_for_sweep()
                if self.closed is None:
                    batch = batch[await self._apply(batch) :]
                await asyncio.sleep(0)

    async def _apply(self, batch: list[Pending]) -> int:
        """Applies the first steps, at least one; how many."""
        started = self._loop.time()
        rows = sum(pending.step.num_rows for pending in batch)
        short = len(batch) <= SHORT_CALL_STEPS and rows <= SHORT_CALL_ROWS and not self.policy.rule.touches_all_rows
        seconds = SHORT_CALL_S if short else CALL_S
        if self.policy.has_snapshots:
            await self._device.run_slices(self.policy.preserve([pending.step.statistics for pending in batch]))
        results, status = await self._device.run(lambda: self._apply_on_device(batch, seconds), short=short)
        self.status = status
        self._telemetry.batch(steps=len(results))
        seconds = self._loop.time() - started
        for pending, result in zip(batch, results, strict=False):
            self._telemetry.stage(method="Exchange", stage="queue", seconds=started - pending.since)
            self._telemetry.stage(method="Exchange", stage="compute", seconds=seconds)
            if isinstance(result, Exception):
                self.queue.settle(pending, result)
                continue
            if result.entry is not None:
                if pending.step.sequence:
                    version, sequence = result.entry.version, pending.step.sequence
                    self._sequences.add(pending.step.trainer_id, version=version, sequence=sequence)
                self.log.add(result.entry, replay_s=result.replay_s)
            self._answer(pending, result.answer)
        for event in self.changed:
            event.set()
        return len(results)

    def _apply_on_device(self, batch: list[Pending], seconds: float) -> tuple[list[Taken | Exception], PolicyStatus]:
        now = self._wall_clock()
        end = time.perf_counter() + seconds
        results: list[Taken | Exception] = []
        # evidence of a step that is followed by another in the same call would never be seen
        last = max((place for place, pending in enumerate(batch) if _has_rows(pending.step)), default=0)
        for place, pending in enumerate(batch):
            try:
                results.append(self.policy.apply(pending.step, now=now, with_evidence=place == last))
            except ServiceError as error:  # it concerns its own step only
                results.append(error)
            except Exception as error:
                if pending.step.kind is not Kind.READ or is_device_fault(error):
                    raise  # the tables may have moved
                results.append(error)
            if time.perf_counter() > end:
                break
        return results, self.policy.status()

    def _answer(self, pending: Pending, answer: Answer) -> None:
        applied_at = self._loop.time()
        self._telemetry.step(policy=self.spec_name, outcome=answer.outcome.name.lower(), rows=pending.step.num_rows)

        def release() -> None:
            self._telemetry.stage(method="Exchange", stage="log", seconds=self._loop.time() - applied_at)
            self.queue.settle(pending, answer)

        if answer.outcome is Outcome.READ or self.policy.spec.durability is Durability.BEHIND:
            release()
        else:
            self.log.when_durable(answer.version, release)

    # The store.

    async def _write_log(self) -> None:
        try:
            await self.log.run()
        except Fenced as error:
            found = Fence.FENCED
            with suppress(StoreError):
                (found,) = await self._store.check_fences([self.owner])
            log.warning("the policy is not ours any more", policy=self.spec_name, epoch=self.epoch, why=found.value)
            raise self._lost(found) from error

    async def _check_fence(self) -> None:
        with suppress(StoreError):
            (found,) = await self._store.check_fences([self.owner])
            self.fence(found)

    def _lost(self, found: Fence) -> ServiceError:
        return policy_deleted(self.spec_name) if found is Fence.DELETED else fenced(self.spec_name)

    def _log_is_long(self) -> bool:
        max_bytes = self._max_log_bytes or max(self._limits.sweep_min_bytes, self._table_bytes)
        record = self.log.record
        return record.log_bytes > max_bytes or record.log_replay_s > self._limits.max_replay_s

    async def _room_for_sweep(self) -> None:
        """Waits while a sweep shortens a log that is too long for its rule, but only as long as it gets on."""
        most, record = self._max_log_bytes, self.log.record
        while most and record.log_bytes > LOG_ROOM * most and self._sweeping and not self.log.failing:
            self._page_written.clear()
            try:
                async with asyncio.timeout(self._limits.log_timeout_s):
                    await self._page_written.wait()
            except TimeoutError:
                return

    async def _sweep_when_due(self) -> None:
        while True:
            await self.log.long.wait()
            try:
                await self.sweep()
            except StoreError as error:  # the log writer deals with the store; the pages are dirty again
                log.warning("a sweep did not end", policy=self.spec_name, error=str(error))
                self._telemetry.swept(ok=False)
                await asyncio.sleep(SWEEP_RETRY_S)

    async def sweep(self, *, bytes_per_s: float | None = None) -> None:
        """Writes changed pages and trims the log, now."""
        started = self._loop.time()
        self._sweeping = True
        try:
            swept = await sweep(
                self.policy,
                log=self.log,
                store=self._store,
                device=self._device,
                bytes_per_s=bytes_per_s or self._limits.sweep_bytes_per_s,
                on_page=self._page_written.set,
            )
        finally:
            self._sweeping = False
            self._page_written.set()
        self._telemetry.swept(ok=True)
        seconds = round(self._loop.time() - started, 3)
        log.info("swept", policy=self.spec_name, pages=swept, through_version=self.log.record.base, seconds=seconds)

    async def _republish(self, on_page: Callable[[], None]) -> tuple[Ownership, int]:
        """Writes everything anew; what is not written then is dirty again."""
        log.warning("writing the whole policy to redis again", policy=self.spec_name, version=self.policy.version)
        snapshot = await self._device.run(self.policy.snapshot_all)
        version = snapshot.header.version

        async def pages() -> AsyncIterator[tuple[int, Page]]:
            async for index, page in self._snapshot_pages(snapshot, version):
                yield index, page
                on_page()

        try:
            renewed = await self._store.republish(
                self.owner, self.stored, version=version, pages=pages(), header=snapshot.header.to_fields()
            )
        except BaseException:
            self._distrust_pages()
            raise
        finally:
            self.policy.close_snapshot(snapshot)
        log.info("redis has the whole policy again", policy=self.spec_name, version=version)
        return renewed, version

    def _distrust_pages(self) -> None:
        self.policy.dirty_pages[:] = True


def _has_rows(step: Step) -> bool:
    return step.kind is Kind.STEP and step.statistics is not None and step.statistics.size > 0
