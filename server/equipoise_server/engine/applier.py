"""Queued steps on their way through the device, into the log, and to their answers."""

import asyncio
import time
from collections.abc import Callable

from equipoise_server.engine.device import is_device_fault
from equipoise_server.engine.loading import Loaded
from equipoise_server.engine.persistence import Persistence
from equipoise_server.engine.policy import Taken
from equipoise_server.engine.queue import Pending, StepQueue
from equipoise_server.engine.session import DurableSequences
from equipoise_server.engine.spec import Durability
from equipoise_server.engine.status import PolicyStatus
from equipoise_server.engine.step import Answer, Kind, Outcome, Step
from equipoise_server.engine.telemetry import Telemetry
from equipoise_server.errors import ServiceError

STEPS_PER_CALL = 64
"""Most steps applied in one device call, so that answers are not held back for too long."""
CALL_S = 0.005
"""How long steps are applied in one device call, unless a single one takes longer."""
INLINE_STEPS, INLINE_ROWS, INLINE_S = 16, 8192, 0.002
"""So few steps with so few rows together are applied on the event loop, for so long."""
QUIET_TURNS = 3
"""Of the event loop without a further step, after which none is waited for: gRPC brings a stream's next in two."""
MAX_SKIPPED = 63
"""Calls at most between two that wait for further steps."""
LONG_ROWS = 16_384
"""A step with more rows takes longer than CALL_S; a row that it only passes over counts as PASSED_ROW of one."""
PASSED_ROW = 0.15


class Applier:
    """Applies the steps of one policy in the order of its queue; `run` is a task of its runner.

    Attributes:
        status: the picture after the last device call.
        changed: events of watchers, set whenever the status changes.
        sequences: which of the trainers' applied steps are in the store.
        stepped_at: when the last step was applied, seconds since 1970; None: none was.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        queue: StepQueue,
        persistence: Persistence,
        telemetry: Telemetry,
        wall_clock: Callable[[], float],
    ) -> None:
        policy = loaded.policy
        self.status: PolicyStatus = policy.status()
        self.changed: set[asyncio.Event] = set()
        trainers = policy.trainers.known
        self.sequences = DurableSequences(durable={key: trainer.last_sequence for key, trainer in trainers.items()})
        self.stepped_at = max((trainer.seen_at for trainer in trainers.values()), default=None)
        self._policy = policy
        self._device = loaded.device
        self._queue = queue
        self._persistence = persistence
        self._log = persistence.log
        self._telemetry = telemetry
        self._wall_clock = wall_clock
        self._loop = asyncio.get_running_loop()
        self._vain = 0
        """Calls in a row that waited for further steps in vain: the next so many do not wait, at most MAX_SKIPPED."""
        self._skipped = 0

    async def run(self) -> None:
        """Applies steps until the queue closes."""
        while self._queue.closed is None:
            await self._queue.wait()
            await self._gather()
            batch = self._queue.take(STEPS_PER_CALL)
            while batch and self._queue.closed is None:
                await self._persistence.room()
                if self._queue.closed is None:
                    batch = batch[await self._apply(batch) :]
                if batch or len(self._queue):
                    await asyncio.sleep(0)  # the turn of everybody else

    async def _gather(self) -> None:
        """Lets more steps come where they follow each other quickly: a call for several costs little more than for one.

        Where none came it is tried again after twice as many calls as before: a trainer with one step in flight is
        hardly ever held up.
        """
        if self._skipped < self._vain:
            self._skipped += 1
            return
        end, quiet, found = self._loop.time() + CALL_S, 0, len(self._queue)
        alone = found == 1
        while quiet < QUIET_TURNS and found < INLINE_STEPS and self._queue.closed is None and self._loop.time() < end:
            await asyncio.sleep(0)
            quiet = 0 if len(self._queue) > found else quiet + 1
            found = len(self._queue)
        self._skipped = 0
        self._vain = min(2 * self._vain + 1, MAX_SKIPPED) if alone and found == 1 else 0

    async def _apply(self, batch: list[Pending]) -> int:
        """Applies the first steps, at least one; how many."""
        started = self._loop.time()
        work = [self._rows_of_work(pending.step) for pending in batch]
        long = work[0] > LONG_ROWS
        if not long:
            batch = batch[: next((place for place, rows in enumerate(work) if rows > LONG_ROWS), len(batch))]
        inline = len(batch) <= INLINE_STEPS and sum(work[: len(batch)]) <= INLINE_ROWS
        seconds = INLINE_S if inline else CALL_S
        if self._policy.has_snapshots:
            await self._device.run_slices(self._policy.preserve([pending.step.statistics for pending in batch]))
        results, status = await self._device.run(
            lambda: self._apply_on_device(batch, seconds), inline=inline, long=long
        )
        self.status = status
        self._telemetry.batch(steps=len(results))
        seconds = self._loop.time() - started
        for pending, result in zip(batch, results, strict=False):
            self._telemetry.stage(method="Exchange", stage="queue", seconds=started - pending.since)
            self._telemetry.stage(method="Exchange", stage="compute", seconds=seconds)
            if isinstance(result, Exception):
                self._queue.settle(pending, result)
                continue
            if result.entry is not None:
                self.stepped_at = self._wall_clock()
                if pending.step.sequence:
                    version, sequence = result.entry.version, pending.step.sequence
                    self.sequences.add(pending.step.trainer_id, version=version, sequence=sequence)
                self._log.add(result.entry, replay_s=result.replay_s)
            self._answer(pending, result.answer)
        for event in self.changed:
            event.set()
        return len(results)

    def _rows_of_work(self, step: Step) -> float:
        """About how many rows a step changes and reads, for the time that it takes."""
        rule, num_examples = self._policy.rule, self._policy.spec.num_examples
        wanted = 0
        if step.wants_weights:
            wanted = num_examples if step.weights_for is None else len(step.weights_for)
            if rule.trajectory_rows and (step.statistics is None or step.statistics.trajectory_row is None):
                wanted *= rule.trajectory_rows  # the mean over all of them
        passed = self._policy.state.num_rows if rule.touches_all_rows and step.kind is Kind.STEP else 0
        return max(step.num_rows, wanted) + PASSED_ROW * passed

    def _apply_on_device(self, batch: list[Pending], seconds: float) -> tuple[list[Taken | Exception], PolicyStatus]:
        now = self._wall_clock()
        end = time.perf_counter() + seconds
        results: list[Taken | Exception] = []
        # evidence of a step that is followed by another in the same call would never be seen
        last = max((place for place, pending in enumerate(batch) if _has_rows(pending.step)), default=0)
        for place, pending in enumerate(batch):
            try:
                results.append(self._policy.apply(pending.step, now=now, with_evidence=place == last))
            except ServiceError as error:  # it concerns its own step only
                results.append(error)
            except Exception as error:
                if pending.step.kind is not Kind.READ or is_device_fault(error):
                    raise  # the tables may have moved
                results.append(error)
            if time.perf_counter() > end:
                break
        return results, self._policy.status()

    def _answer(self, pending: Pending, answer: Answer) -> None:
        applied_at = self._loop.time()
        name, outcome = self._policy.spec.name, answer.outcome.name.lower()
        self._telemetry.step(policy=name, outcome=outcome, rows=pending.step.num_rows)
        if answer.outcome is Outcome.REFUSED and answer.error is not None:
            self._telemetry.refused(reason=answer.error.reason)

        def release() -> None:
            self._telemetry.stage(method="Exchange", stage="log", seconds=self._loop.time() - applied_at)
            self._queue.settle(pending, answer)

        if answer.outcome is Outcome.READ or self._policy.spec.durability is Durability.BEHIND:
            release()
        else:
            self._log.when_durable(answer.version, release)


def _has_rows(step: Step) -> bool:
    return step.kind is Kind.STEP and step.statistics is not None and step.statistics.size > 0
