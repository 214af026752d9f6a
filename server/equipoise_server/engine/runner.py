"""A policy in service: what callers ask of it, its trainers' sessions, and its end."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, aclosing, closing, contextmanager
from contextvars import Context
from enum import Enum
from typing import Any, TypeVar

import structlog

from equipoise_server import logs
from equipoise_server.engine.applier import Applier
from equipoise_server.engine.limits import EngineLimits
from equipoise_server.engine.loading import Loaded
from equipoise_server.engine.memory import Backlogs
from equipoise_server.engine.persistence import Persistence
from equipoise_server.engine.policy import Policy
from equipoise_server.engine.queue import StepQueue, Told, into
from equipoise_server.engine.session import ANONYMOUS, Opener, Session
from equipoise_server.engine.snapshot import Snapshot, read_pages
from equipoise_server.engine.snapshots import Snapshots
from equipoise_server.engine.status import PolicyStatus, ServiceStatus
from equipoise_server.engine.step import Answer, Kind, Step
from equipoise_server.engine.telemetry import Telemetry
from equipoise_server.errors import Code, ServiceError, draining, internal
from equipoise_server.rules import Slices
from equipoise_server.store import Fence, Ownership, Page, RedisStore

T = TypeVar("T")

log = structlog.get_logger("equipoise.policy")


class State(Enum):
    """Where a policy in service stands; before it, it is `Loading`."""

    SERVING = "serving"
    DRAINING = "draining"
    """Takes no new streams, and soon nothing: it is being handed over, or it ends."""
    CLOSED = "closed"
    """Has left memory."""


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
        limits: EngineLimits,
        backlogs: Backlogs,
        telemetry: Telemetry,
        on_closed: Callable[["PolicyRunner"], None],
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        policy = loaded.policy
        self.policy = policy
        self.stored = loaded.stored
        self.state = State.SERVING
        self.sessions: dict[str, Session] = {}
        self._device = loaded.device
        self._conversions = loaded.host
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
        self._persistence = Persistence(loaded, store=store, limits=limits, backlogs=backlogs, telemetry=telemetry)
        self.log = self._persistence.log
        self.sweep = self._persistence.sweep
        self._applier = Applier(
            loaded, queue=self.queue, persistence=self._persistence, telemetry=telemetry, wall_clock=wall_clock
        )
        self.changed = self._applier.changed
        """Events of watchers, set whenever the status changes."""
        self._stays_until = 0.0
        self._used_at = self._loop.time()
        self._snapshots = Snapshots(policy, wait_s=limits.load_wait_s)
        self._vacant = asyncio.Event()
        self._vacant.set()
        self._stopping: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._applying = self._start(self._applier.run())
        self._start(self._persistence.write())
        self._sweeper = self._start(self._persistence.sweep_when_due())

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
        return self._persistence.owner

    @property
    def closed(self) -> ServiceError | None:
        """Why nothing is taken any more."""
        return self.queue.closed

    @property
    def status(self) -> PolicyStatus:
        """The picture after the last device call."""
        return self._applier.status

    @property
    def service(self) -> ServiceStatus:
        """How the policy is served now."""
        record = self.log.record
        return ServiceStatus(
            policy=self.status,
            trainers=len(self.sessions),
            known_trainers=len(self.policy.trainers.known),
            stepped_at=self._applier.stepped_at,
            queued_steps=len(self.queue),
            queue_ratio=self.queue.fill_ratio,
            unpersisted=self.log.backlog,
            lag_s=self.log.lag_s,
            log_entries=record.durable_version - record.base,
            log_bytes=record.log_bytes,
            log_replay_s=record.log_replay_s,
        )

    def durable_sequence(self, trainer_id: str) -> int:
        """All steps of the trainer up to this sequence are in the store."""
        return self._applier.sequences.get(trainer_id, durable_version=self.log.record.durable_version)

    def is_idle(self, idle_s: float) -> bool:
        """Whether nobody has used the policy for so long, and all of it is in the store."""
        used = self.sessions or self.changed or self.queue.is_busy or self.policy.has_snapshots or self.log.is_behind
        return not used and self._loop.time() - self._used_at > idle_s

    @property
    def can_move(self) -> bool:
        """Whether the policy may be handed to another server now: no reader of all of it is cut short by that.

        Nor does it leave a server that has what the store does not take.
        """
        free = not (self.log.failing or self.policy.has_snapshots)
        return free and self.state is State.SERVING and self._loop.time() >= self._stays_until

    @property
    def is_attended(self) -> bool:
        """Whether somebody has a stream open, who will ask for the policy wherever it is."""
        return bool(self.sessions or self.changed)

    def stay(self, seconds: float) -> None:
        """Callers can reach the policy only here: it is not handed over for so long."""
        self._stays_until = self._loop.time() + seconds

    # What callers ask for.

    async def open(self, trainer_id: str, opener: Opener = ANONYMOUS) -> tuple[Session, Answer]:
        """Opens a stream for a trainer, after all it has sent so far; an older stream of the trainer ends."""
        self._check_open()
        if self.state is not State.SERVING:
            raise draining()
        if before := self.sessions.get(trainer_id):
            if opener.is_behind(before.opener):
                message = (
                    f"opening {opener.attempt} of trainer {trainer_id!r}, behind its opening {before.opener.attempt}"
                )
                raise ServiceError(Code.ABORTED, "STALE_OPENING", message)
            message = f"trainer {trainer_id!r} opened another stream; this one ends"
            before.end(ServiceError(Code.ABORTED, "TRAINER_REPLACED", message))
        session = self.sessions[trainer_id] = Session(trainer_id, opener)
        self._vacant.clear()
        try:
            await self.check_fence()
            await self.forget_idle(but=trainer_id)
            self.policy.trainers.check_room(trainer_id)
            opening = Step(kind=Kind.READ, trainer_id=trainer_id, wants_weights=False)
            answer = await (await self.submit(opening))
            if self.state is not State.SERVING:
                raise draining()
            if not answer.last_sequence:
                self._applier.sequences.forget(trainer_id)
            return session, answer
        except BaseException:
            self.close_session(session)
            raise

    async def forget_idle(self, *, but: str = "") -> None:
        """Forgets trainers that are idle for too long and have no open stream, or open one just now (`but`).

        No use of the policy: it may become idle all the same.
        """
        here = self.sessions.keys() - {but}
        for idle in await self._device.run(lambda: self._here().trainers.forget_idle(self._wall_clock(), here=here)):
            self._applier.sequences.forget(idle)

    def close_session(self, session: Session) -> None:
        """The stream has ended."""
        if self.sessions.get(session.trainer_id) is session:
            del self.sessions[session.trainer_id]
        if not self.sessions:
            self._vacant.set()

    async def submit(self, step: Step) -> asyncio.Future[Answer]:
        """Queues a step when there is room; the future holds its answer once it may be sent."""
        answer: asyncio.Future[Answer] = self._loop.create_future()
        await self.give(step, into(answer))
        return answer

    async def give(self, step: Step, told: Told) -> None:
        """Queues a step when there is room; `told` hears its answer once it may be sent, never before this returns."""
        self._check_open()
        await self.queue.put(step, told)

    def submit_now(self, step: Step) -> asyncio.Future[Answer]:
        """Queues a step. Raises ServiceError (QUEUE_FULL) when there is no room."""
        self._check_open()
        answer: asyncio.Future[Answer] = self._loop.create_future()
        self.queue.put_now(step, into(answer))
        return answer

    async def read(self, call: Callable[[Policy], T], *, long: bool = False) -> T:
        """What `call` reads from the policy between two device calls; `long`: it may take more than milliseconds."""
        self._check_open()
        return await self._device.run(lambda: call(self._here()), long=long)

    async def convert(self, call: Callable[[Policy], T]) -> T:
        """What `call` makes of a large request beside the event loop, in this policy's turn; it reads no table."""
        self._check_open()
        return await self._conversions.run(lambda: call(self._here()), long=True)

    async def read_slices(self, slices: Slices[T]) -> T:
        """What long work reads, for example of a snapshot; steps go on between two pieces."""
        self._check_open()
        return await self._device.run_slices(self._while_here(slices))

    def _while_here(self, slices: Slices[T]) -> Slices[T]:
        with closing(slices):
            while True:
                self._here()
                try:
                    next(slices)
                except StopIteration as ended:
                    result: T = ended.value
                    return result
                yield

    def snapshot(self) -> AbstractAsyncContextManager[Snapshot]:
        """The policy of now, for reading while steps go on. Raises ServiceError (TOO_MANY_READERS)."""
        return self._snapshots.take(self.read)

    async def pages(self, snapshot: Snapshot, *, version: int) -> AsyncGenerator[tuple[int, Page], None]:
        """A snapshot's pages, each once, said to be of a version."""
        async with aclosing(read_pages(snapshot, self._device, version=version)) as pages:
            async for numbered in pages:
                self._check_open()
                yield numbered

    async def check_fence(self) -> None:
        """Ends the policy here if it is another server's or was deleted; returns unknowing if the store stalls."""
        if (found := await self._persistence.check_fence()) is not None:
            self.fence(found)
        self._check_open()

    def fence(self, found: Fence) -> None:
        """The store has told how the ownership stands: what it forgot is written anew, a lost policy ends here."""
        if self._stopping is not None:
            return
        if found is Fence.FORGOTTEN:
            self.log.lose(None)
        elif found is not Fence.HELD:
            self._begin_stop(self._persistence.lost(found))

    # The end.

    def drain(self) -> None:
        """Asks every stream to reconnect elsewhere, and takes no more of them."""
        self.state = State.DRAINING
        for session in self.sessions.values():
            session.drain()

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
            raise self.closed.again()

    def _begin_stop(self, error: ServiceError, *, flush_timeout_s: float = 0.0) -> None:
        if self._stopping is None:
            self.state = State.DRAINING
            self.queue.refuse(error)
            self._stopping = self._loop.create_task(self._stop(error, flush_timeout_s), context=Context())

    async def _stop(self, error: ServiceError, flush_timeout_s: float) -> None:
        with self._whatever_happens():
            if flush_timeout_s:
                end = self._loop.time() + flush_timeout_s
                await asyncio.wait([self._applying], timeout=flush_timeout_s)  # what is being applied comes first
                self._sweeper.cancel()
                await asyncio.wait([self._sweeper])
                await self._persistence.finish(timeout_s=max(0.0, end - self._loop.time()))
        self.log.end()
        self.queue.close(error)
        for session in list(self.sessions.values()):
            session.end(error)
        for event in self.changed:
            event.set()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with self._whatever_happens():
            await self._device.run(self.policy.drop)
        with self._whatever_happens():
            await self._persistence.release()
        self.state = State.CLOSED
        self._telemetry.left(reason=error.reason)
        self._on_closed(self)

    @contextmanager
    def _whatever_happens(self) -> Iterator[None]:
        """The end goes on after an error in one of its parts."""
        try:
            yield
        except Exception as error:
            log.error("a policy did not end in order", policy=self.spec_name, exc_info=error)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._begin_stop(self._reason(error))

    def _reason(self, error: BaseException) -> ServiceError:
        """What ends the policy when one of its tasks ends with an error."""
        if isinstance(error, ServiceError):
            if error.reason == "DEVICE_LOST":
                log.error("the device failed; the policy leaves memory", policy=self.spec_name, error=str(error))
            return error
        error_id = logs.new_id()
        log.error(
            "unexpected error; the policy leaves memory", policy=self.spec_name, error_id=error_id, exc_info=error
        )
        return internal(error_id)

    def _check_open(self) -> None:
        self._used_at = self._loop.time()
        if self.closed is not None:
            raise self.closed.again()

    def _here(self) -> Policy:
        """The policy, unless its tables have left memory while a call waited for the device."""
        if self.closed is not None:
            raise self.closed.again()
        return self.policy
