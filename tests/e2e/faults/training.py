"""A training loop that never stops, watched: how long its steps take, and where their weights come from."""

import threading
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any

import numpy as np

from equipoise import Backoff, Limits, PolicyClient, Source, Stats, StepResult, Timeout
from tests.e2e.faults.proxy import until

ROWS = 16
ROOM = Limits(window_steps=1 << 16)
"""Room for every step of minutes without a server, so that none is dropped: a step takes 3 ms at least."""


@dataclass(frozen=True, slots=True)
class Made:
    """One step of the loop.

    Attributes:
        at: when its call began (monotonic, seconds).
        seconds: how long the call took.
        result: what it gave.
    """

    at: float
    seconds: float
    result: StepResult


class Training:
    """Steps without end in a thread, with `when_lost="continue"`, `ROOM`, and else the client's defaults.

    Use as a context manager: leaving it ends the loop, waits until every step is durable, and raises what went wrong.
    """

    def __init__(self, address: str, *, policy: str = "p", num_examples: int = 1000, **options: Any) -> None:
        self.made: list[Made] = []
        self.failure: BaseException | None = None
        self.closed_in_s = 0.0
        options = {"timeout": Timeout(), "backoff": Backoff(), "limits": ROOM, **options}
        self.client = PolicyClient(address, policy=policy, num_examples=num_examples, **options)
        self._num_examples = num_examples
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Training":
        self._thread.start()
        until(lambda: self.failure or self.served_since(0.0), what="the first answer")
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._stopping.set()
        self._thread.join(60)
        try:
            if kind is None:
                assert not self._thread.is_alive(), "the training loop hangs"
                if self.failure is not None:
                    raise self.failure
                assert self.client.flush(60, durable=True)
        finally:
            started = monotonic()
            self.client.close()
            self.closed_in_s = monotonic() - started

    @property
    def stats(self) -> Stats:
        """Counters of the client."""
        return self.client.stats

    @property
    def sent(self) -> int:
        """Steps that reach the server sooner or later: all but those dropped while the window was full."""
        return self.stats.steps - self.stats.dropped

    def assert_kept(self, *, room: bool = True) -> None:
        """Nothing that was durable is lost; and nothing else, where there is `room` in the window for it."""
        stats = self.stats
        assert (stats.lost, stats.regressions, stats.refused) == (0, 0, 0)
        assert not (room and (stats.dropped or stats.forgotten)), stats

    def served_since(self, moment: float) -> bool:
        """Whether a step that began after a moment was answered by the server."""
        return any(made.at > moment and made.result.source is Source.SERVED for made in self.made[-50:])

    def wait_until_served(self, *, within_s: float = 60.0) -> float:
        """Waits for a step that begins now or later to be answered; seconds it took."""
        now = monotonic()
        until(lambda: self.failure or self.served_since(now), within_s=within_s, what="an answer of the server")
        return next(m.at + m.seconds for m in self.made if m.at > now and m.result.source is Source.SERVED) - now

    def wait_until_durable(self, *, within_s: float = 60.0) -> float:
        """Waits until a step that begins now or later is durable; seconds it took."""
        sequence = self.sent
        return until(
            lambda: self.failure or (self.made and self.made[-1].result.durable_sequence > sequence),
            within_s=within_s,
            what="a durable step",
        )

    def since(self, moment: float) -> "Seen":
        """What the loop saw from a moment on."""
        return Seen.of([made for made in list(self.made) if made.at + made.seconds > moment], moment)

    def until(self, begin: float, end: float) -> "Seen":
        """What the loop saw between two moments."""
        return Seen.of([made for made in list(self.made) if begin <= made.at and made.at + made.seconds <= end], begin)

    def first_not_durable(self, moment: float) -> float | None:
        """Seconds from a moment to the first answer that came before its step was durable; None: there was none."""
        for position, made in enumerate(list(self.made), start=1):
            answered = made.at + made.seconds
            if answered > moment and made.result.durable_sequence < position:
                return answered - moment
        return None

    def _run(self) -> None:
        random = np.random.default_rng(0)
        try:
            while not self._stopping.is_set():
                ids = random.integers(0, self._num_examples, ROWS)
                started = monotonic()
                result = self.client.step(ids, contributions=random.standard_normal(ROWS))
                self.made.append(Made(started, monotonic() - started, result))
                sleep(0.003)
        except BaseException as error:
            self.failure = error


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a training loop saw of a fault.

    Attributes:
        steps: steps made.
        longest_step_s: longest wait of one step.
        slow_steps: steps that took longer than 0.1 s.
        noticed_s: until the first step that was not answered by the server; None: there was none.
        unserved: steps answered from older weights, or uniformly.
        staleness: most steps that the weights used were old.
    """

    steps: int
    longest_step_s: float
    slow_steps: int
    noticed_s: float | None
    unserved: int
    staleness: int

    @classmethod
    def of(cls, made: list[Made], moment: float) -> "Seen":
        """What some steps saw."""
        without = [each for each in made if each.result.source is not Source.SERVED]
        return cls(
            steps=len(made),
            longest_step_s=max(each.seconds for each in made),
            slow_steps=sum(each.seconds > 0.1 for each in made),
            noticed_s=without[0].at + without[0].seconds - moment if without else None,
            unserved=len(without),
            staleness=max(each.result.staleness for each in made),
        )

    def __str__(self) -> str:
        went_on = f"{self.unserved} steps on older weights (≤ {self.staleness} steps old), " if self.unserved else ""
        return f"{went_on}longest step {self.longest_step_s:.2f} s"
