"""Trainers that write down what they send and what they are answered, in the ways in which a client can be used."""

import asyncio
import threading
from abc import ABC, abstractmethod
from contextlib import suppress
from time import monotonic, sleep
from typing import Any

import numpy as np

from equipoise import Backoff, Outcome, PolicyClient, Stats, Timeout, aio
from equipoise.errors import StepRefusedError
from tests.e2e.faults.history import Answered, History, Sent

BACKOFF = Backoff(first=0.02, longest=0.25)
PATIENT = Timeout(wait=120.0, connect=5.0, close=1.0)
HASTY = Timeout(step=0.05, connect=5.0, close=1.0)
FEW_ROWS, MANY_ROWS = 48, 4096
MAX_UNDURABLE = 150
"""Steps by which a trainer runs ahead of what is durable: within its window, so that none has to be let go."""
LAST_FLUSH_SECONDS = 60.0


class Trainer(ABC):
    """A thread that trains until it is stopped, then waits until all of its steps are durable.

    Args:
        address: of the server.
        policy: name of the policy.
        num_examples: N.
        history: where it writes.
        seed: of what it sends.
    """

    kind = ""
    when_lost = "wait"
    timeout = PATIENT

    def __init__(self, address: str, *, policy: str, num_examples: int, history: History, seed: int) -> None:
        self.trainer_id = f"{self.kind}-{seed}"
        self.hurry = threading.Event()
        """Set: many rows and no pauses, so that the log grows quickly."""
        self.failure: BaseException | None = None
        self.past: list[Stats] = []
        """Counters of clients that were closed."""
        self._address = address
        self._policy = policy
        self._num_examples = num_examples
        self._history = history
        self._random = np.random.default_rng([seed, len(self.kind)])
        self._stopping = threading.Event()
        self._restart = threading.Event()
        self._client: Any = self._connect()
        self._thread = threading.Thread(target=self._run, name=self.trainer_id, daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def restart(self) -> None:
        """Soon another client takes over, from the state dict of this one."""
        self._restart.set()

    def stop(self) -> None:
        """Asks it to end; `join` waits."""
        self.hurry.clear()
        self._stopping.set()

    def join(self) -> None:
        """Waits for its end. Raises what went wrong in the training loop."""
        self._thread.join(2 * LAST_FLUSH_SECONDS)
        assert not self._thread.is_alive(), f"{self.trainer_id} does not end"
        if self.failure is not None:
            raise self.failure

    @property
    def in_flight(self) -> int:
        """Steps that wait for their answer now."""
        return int(self._client.stats.unacked)

    @property
    def stats(self) -> list[Stats]:
        """Counters of all its clients."""
        return [*self.past, self._client.stats]

    def describe(self) -> str:
        """How it stands with the server, without waiting for anything: what its client would not tell is looked up."""
        session = self._client._session
        link, outage = session._link, session._outage
        planned = "none" if link.connect_at is None else f"in {link.connect_at - monotonic():.2f} s"
        return (
            f"{self.trainer_id}: {session.stats}; outage active: {outage.active}, attempts {outage._attempts}; "
            f"stream {link.generation} is {link.state.value}, the next {planned}; in flight {len(session._in_flight)}, "
            f"outbox {len(session._outbox)}, window {len(session._window)}; failure: {session.failure!r}, here "
            f"{self.failure!r}; restart asked for: {self._restart.is_set()}"
        )

    @abstractmethod
    def train(self) -> None:
        """Makes steps until `self._stopping` is set, then waits until all are durable."""

    def _run(self) -> None:
        try:
            self.train()
        except BaseException as error:
            self.failure = error

    def _connect(self) -> Any:
        return PolicyClient(self._address, **self._options())

    def _options(self) -> dict[str, Any]:
        return {
            "policy": self._policy,
            "num_examples": self._num_examples,
            "trainer_id": self.trainer_id,
            "when_lost": self.when_lost,
            "timeout": self.timeout,
            "backoff": BACKOFF,
        }

    def _next(self) -> Sent:
        rows = int(self._random.integers(1, MANY_ROWS if self.hurry.is_set() else FEW_ROWS))
        ids = self._random.integers(0, self._num_examples, rows)
        contributions = (self._random.standard_normal(rows) + np.sin(ids)).astype(np.float32)
        losses = self._random.random(rows).astype(np.float32)
        # Without contributions most rules refuse: that too must happen exactly once.
        return Sent(ids=ids, contributions=None if self._random.random() < 0.03 else contributions, losses=losses)

    def _note(self, step: Sent) -> int:
        """Writes down a step; its sequence."""
        self._history.sent[self.trainer_id].append(step)
        return len(self._history.sent[self.trainer_id])

    def _heard(self, answer: Answered) -> None:
        self._history.answered[self.trainer_id].append(answer)

    def _understand(self, refusal: StepRefusedError, sequence: int) -> None:
        """The step was refused, or it was not made since an earlier one had been refused behind our back."""
        if refusal.sequence == sequence:
            self._heard(Answered(sequence=sequence, outcome=None))
        else:
            self._take_back()

    def _take_back(self) -> None:
        self._history.sent[self.trainer_id].pop()

    @property
    def awaited(self) -> int:
        """Answered steps that it waits for to be durable, before it makes more; 0: it does not wait."""
        undurable = self._client.stats.undurable
        return undurable if undurable > MAX_UNDURABLE else 0

    def _wait_for_room(self) -> None:
        while self.awaited and not self._stopping.is_set():
            sleep(0.005)
            self._probe()

    def _probe(self) -> None:
        """Asks how far the steps are durable."""
        with suppress(StepRefusedError):
            self._client.flush(0.02, durable=True)

    def _rest(self) -> float:
        return 0.0 if self.hurry.is_set() else float(self._random.uniform(0, 0.01))

    def _take_over(self) -> None:
        """Another client goes on where this one stops."""
        self._restart.clear()
        state = self._client.state_dict()
        self._client.close()
        self.past.append(self._client.stats)
        successor = self._connect()
        successor.load_state_dict(state)
        self._client = successor

    def _finish(self) -> None:
        while True:
            try:
                durable = self._client.flush(LAST_FLUSH_SECONDS, durable=True)
            except StepRefusedError:  # one that was submitted
                continue
            assert durable, f"{self.trainer_id}: not durable"
            break
        self._history.durable[self.trainer_id] = len(self._history.sent[self.trainer_id])
        self._client.close()


class Waiting(Trainer):
    """Waits for the answer of each step, as long as it takes."""

    kind = "waiting"

    def train(self) -> None:
        """See the base."""
        while not self._stopping.is_set():
            if self._restart.is_set():
                self._take_over()
            step = self._next()
            sequence = self._note(step)
            try:
                result = self._client.step(step.ids, **step.fields)
            except StepRefusedError as refusal:
                self._understand(refusal, sequence)
            else:
                self._heard(Answered.of(result, sequence=sequence, ids=step.ids))
            self._wait_for_room()
            sleep(self._rest())
        self._finish()


class Continuing(Trainer):
    """Waits a moment for the answer of each step, and trains on without."""

    kind = "continuing"
    when_lost = "continue"
    timeout = HASTY

    def train(self) -> None:
        """See the base."""
        while not self._stopping.is_set():
            if self._restart.is_set():
                self._take_over()
            step = self._next()
            sequence = self._note(step)
            try:
                result = self._client.step(step.ids, **step.fields)
            except StepRefusedError as refusal:
                self._understand(refusal, sequence)
                continue
            if result.outcome is Outcome.DROPPED:
                self._take_back()
            else:
                self._heard(Answered.of(result, sequence=sequence, ids=step.ids))
            self._wait_for_room()
            sleep(self._rest() + 0.001)
        self._finish()


class Submitting(Continuing):
    """Submits its steps and never waits; reads weights now and then."""

    kind = "submitting"

    def train(self) -> None:
        """See the base."""
        while not self._stopping.is_set():
            if self._restart.is_set():
                self._take_over()
            step = self._next()
            dropped = self._client.stats.dropped
            sequence = self._note(step)
            try:
                self._client.submit(step.ids, **step.fields)
                if self._client.stats.dropped > dropped:
                    self._take_back()
            except StepRefusedError as refusal:
                self._understand(refusal, sequence)
            if self._random.random() < 0.2:
                self._read(step.ids)
            self._wait_for_room()
            sleep(self._rest() + 0.001)
        self._finish()

    def _read(self, ids: Any) -> None:
        try:
            result = self._client.read(ids)
        except StepRefusedError:
            return
        self._heard(Answered.of(result, sequence=0, ids=ids))


class Async(Trainer):
    """Four steps under way at once, over asyncio."""

    kind = "async"

    def train(self) -> None:
        """See the base."""
        asyncio.run(self._train())

    async def _train(self) -> None:
        async with aio.PolicyClient(self._address, **self._options()) as client:
            self._client = client
            while not self._stopping.is_set():
                await asyncio.gather(*(self._step(client) for _ in range(4)))
                while self.awaited and not self._stopping.is_set():
                    with suppress(StepRefusedError):
                        await client.flush(0.02, durable=True)
                await asyncio.sleep(self._rest())
            assert await client.flush(LAST_FLUSH_SECONDS, durable=True), f"{self.trainer_id}: not durable"
            self._history.durable[self.trainer_id] = len(self._history.sent[self.trainer_id])

    async def _step(self, client: aio.PolicyClient) -> None:
        step = self._next()
        sequence = self._note(step)
        try:
            result = await client.step(step.ids, **step.fields)
        except StepRefusedError as refusal:
            self._understand(refusal, sequence)
        else:
            self._heard(Answered.of(result, sequence=sequence, ids=step.ids))

    def _connect(self) -> Any:
        return aio.PolicyClient(self._address, **self._options())


KINDS: tuple[type[Trainer], ...] = (Waiting, Continuing, Submitting, Async)
