"""Servers that share a Redis under trainers that never stop, one for each policy; every step is written down."""

from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from time import monotonic
from typing import Any

from equipoise import Backoff, Outcome, PolicyAdmin, Timeout
from equipoise_server.rules import build
from tests.e2e.faults.aof import read_logs
from tests.e2e.faults.checker import Model, check
from tests.e2e.faults.gauges import gauges
from tests.e2e.faults.history import Answered, History, Sent
from tests.e2e.faults.long_logs import EARLIER, small_steps, write_policies
from tests.e2e.faults.proxy import until
from tests.e2e.faults.redis_server import RedisServer
from tests.e2e.faults.trainers import Continuing
from tests.e2e.faults.zygote import ForkedServer, Zygote
from tests.e2e.watched import page

RULE = "ema_sign"
NUM_EXAMPLES = 1000
STEP_EVERY_S = 0.02
SERVED = (Outcome.APPLIED, Outcome.DUPLICATE)
WITHIN_S = 300.0
"""Far more than it takes: a busy machine may take its time."""


class Steady(Continuing):
    """A step every `STEP_EVERY_S`, with the client's own deadlines and waits, and none that a rule refuses."""

    kind = "steady"
    timeout = Timeout()

    def __init__(self, address: str, **options: Any) -> None:
        self.served_at: list[float] = []
        """When the server's answers came (monotonic, seconds)."""
        super().__init__(address, **options)

    @property
    def awaited(self) -> int:
        """It never waits for what is not durable."""
        return 0

    def longest_stale_s(self, since: float = 0.0) -> float:
        """Longest time between two answers, of those that ended after a moment: weights were older than the step."""
        return max(after - before for before, after in pairwise(self.served_at) if after > since)

    def _options(self) -> dict[str, Any]:
        return super()._options() | {"backoff": Backoff()}

    def _next(self) -> Sent:
        [step] = small_steps(1, num_examples=self._num_examples, seed=int(self._random.integers(1 << 32)))
        return step

    def _rest(self) -> float:
        return STEP_EVERY_S

    def _heard(self, answer: Answered) -> None:
        super()._heard(answer)
        if answer.outcome in SERVED:
            self.served_at.append(monotonic())


class Fleet:
    """The servers and what they share. Use as a context manager: leaving it ends every process.

    Attributes:
        servers: those that were ever started.
        trainers: one for each policy, once `train` was called.
    """

    def __init__(self, directory: Path, zygote: Zygote, *, policies: int, logged_steps: int, **settings: Any) -> None:
        self.servers: list[ForkedServer] = []
        self.trainers: list[Steady] = []
        self._directory = directory
        self._zygote = zygote
        self._settings = settings
        self._redis = RedisServer(directory / "redis")
        self._unserved_at_first = 0
        self._histories = {f"p{number}": History() for number in range(policies)}
        earlier = self._earlier = small_steps(logged_steps, num_examples=NUM_EXAMPLES)
        for history in self._histories.values():
            history.sent[EARLIER] = earlier
        with ExitStack() as stack:
            self._redis.start()
            stack.callback(self._redis.kill)
            write_policies(self._redis.url, list(self._histories), rule=RULE, num_examples=NUM_EXAMPLES, steps=earlier)
            self._stack = stack.pop_all()

    def __enter__(self) -> "Fleet":
        return self

    def __exit__(self, *_: object) -> None:
        for trainer in self.trainers:
            trainer.stop()
        self._stack.close()

    def serve(self) -> ForkedServer:
        """One server more, which is ready."""
        folder = self._directory / f"server-{len(self.servers)}"
        server = ForkedServer(self._zygote, folder, redis_url=self._redis.url, **self._settings)
        self._stack.callback(server.kill)
        self.servers.append(server)
        self.start(server)
        return server

    def start(self, server: ForkedServer) -> None:
        """Starts a server and returns once it is ready."""
        server.start()
        until(lambda: page(server.metrics_address, "/readyz")[0] == 200, within_s=WITHIN_S, what="a server is ready")

    def train(self, address: str) -> None:
        """Starts the trainers, and returns once each of them was answered."""
        for number, (name, history) in enumerate(self._histories.items()):
            trainer = Steady(address, policy=name, num_examples=NUM_EXAMPLES, history=history, seed=number)
            self.trainers.append(trainer)
            trainer.start()
        self.wait_until_served()
        self._unserved_at_first = self._unserved

    def wait_until_served(self) -> None:
        """Returns once every trainer was answered after now."""
        now = monotonic()
        for trainer in self.trainers:
            until(
                lambda trainer=trainer: trainer.failure or (trainer.served_at and trainer.served_at[-1] > now),  # type: ignore[misc]
                within_s=WITHIN_S,
                what=lambda trainer=trainer: f"an answer; {trainer.describe()}",  # type: ignore[misc]
            )

    def longest_stale_s(self, since: float) -> float:
        """Longest time that any trainer was without an answer, of times that ended after a moment."""
        return max(trainer.longest_stale_s(since) for trainer in self.trainers)

    def loads(self) -> list[int]:
        """How many policies each server that runs has in memory."""
        return [int(gauges(server)["policies"]) for server in self.servers if server.pid]

    def finish(self) -> str:
        """Ends the trainers; what they saw since they were served first, in words.

        Fails unless no step has failed and none was lost: every one is in the log exactly once, and every weight that
        was ever served is that of the reference rule.
        """
        for trainer in self.trainers:
            trainer.stop()
        for trainer in self.trainers:
            trainer.join()
            [stats] = trainer.stats
            assert (stats.lost, stats.regressions, stats.refused, stats.dropped, stats.forgotten) == (0, 0, 0, 0, 0)
        logs, rule = read_logs(self._redis.append_only_file), build(RULE, {})
        begun = Model.of(rule, NUM_EXAMPLES)
        for step in self._earlier:
            begun.take(step)
        with PolicyAdmin(next(server.address for server in self.servers if server.pid)) as admin:
            for name, history in self._histories.items():
                findings = check(history, logs[name], rule=rule, num_examples=NUM_EXAMPLES, begun=begun)
                assert not findings.violations, (name, findings.violations[:10])
                assert len(logs[name].entries) == sum(map(len, history.sent.values()))
                assert admin.get(name).version == len(logs[name].entries)
        unserved = self._unserved - self._unserved_at_first
        return f"{unserved} of {sum(trainer.stats[0].steps for trainer in self.trainers)} steps on older weights"

    @property
    def _unserved(self) -> int:
        return sum(trainer.stats[0].fallbacks for trainer in self.trainers)
