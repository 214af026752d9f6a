"""A well-behaved trainer: what it feels of what others do, and whether it still gets what is right."""

import random
import time
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection

import numpy as np
from numpy.typing import NDArray

from equipoise import PolicyClient, Security, Timeout

NUM_EXAMPLES = 100_000
ROWS = 64
PACE_S = 0.01
TRAINER_ID = "neighbour"


@dataclass(frozen=True, slots=True)
class Stretch:
    """Steps between two moments.

    Attributes:
        seconds: how long each took.
    """

    seconds: list[float] = field(default_factory=list)

    def quantile_ms(self, share: float) -> float:
        """Milliseconds; NaN without steps."""
        return 1e3 * float(np.quantile(self.seconds, share)) if self.seconds else float("nan")


def rows(number: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Ids and contributions of step `number`: the same, whoever makes it."""
    random = np.random.default_rng(number)
    return random.choice(NUM_EXAMPLES, ROWS, replace=False), random.standard_normal(ROWS).astype(np.float32)


def _train(pipe: Connection, address: str, policy: str, security: Security, first: int) -> None:
    with PolicyClient(
        address,
        policy=policy,
        num_examples=NUM_EXAMPLES,
        security=security,
        trainer_id=TRAINER_ID,
        when_lost="wait",
        timeout=Timeout(wait=600.0),
    ) as client:
        seconds: list[float] = []
        number = first
        while True:
            if pipe.poll():
                question = pipe.recv()
                pipe.send((number, seconds))
                seconds = []
                if question == "end":
                    return
            started = time.perf_counter()
            ids, contributions = rows(number)
            client.step(ids, contributions=contributions)
            seconds.append(time.perf_counter() - started)
            number += 1
            time.sleep(PACE_S * (0.5 + random.random()))


class Neighbour:
    """A trainer in a process of its own, which makes a step every 10 ms or so and waits for its weights."""

    def __init__(self, address: str, policy: str, security: Security) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_train, args=(theirs, address, policy, security, 0), daemon=True)
        self._process.start()
        self.policy = policy
        self.steps = 0

    def stretch(self, *, end: bool = False, timeout_s: float = 300.0) -> Stretch:
        """The steps since it was last asked; with `end` it makes no more."""
        self._pipe.send("end" if end else "go on")
        if not self._pipe.poll(timeout_s):
            raise TimeoutError(f"{self.policy}: a step was not answered for {timeout_s:.0f} s")
        self.steps, seconds = self._pipe.recv()
        if end:
            self._process.join(60)
        return Stretch(seconds)
