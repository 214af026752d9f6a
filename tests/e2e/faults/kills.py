"""The kill run: trainers train while a schedule of faults, drawn from one seed, lands on their server and its Redis."""

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic, sleep

import numpy as np

from equipoise import PolicyAdmin, PolicyClient
from equipoise.archive import PolicyArchive
from equipoise_server.rules import build
from equipoise_server.store import scripts
from tests.e2e.faults.aof import Log, read_log
from tests.e2e.faults.checker import Findings, check
from tests.e2e.faults.gauges import gauges, log_start
from tests.e2e.faults.history import History
from tests.e2e.faults.postmortem import postmortem
from tests.e2e.faults.proxy import At, FaultProxy, Way, until
from tests.e2e.faults.redis_server import RedisServer
from tests.e2e.faults.schedule import Fault
from tests.e2e.faults.trainers import KINDS, Async, Trainer
from tests.e2e.faults.zygote import ForkedServer, Zygote

POLICY = "run"
NUM_EXAMPLES = 70_000
"""Two pages, and tables smaller than the log at which a sweep begins."""
RULES = ("ema_sign", "ema_relu", "exponentiated_gradient")
SWEEP_MIN_BYTES = 2 << 20
RESTORING = (b"XRANGE", b"HGETALL", scripts.ACQUIRE.sha.encode())
SWEEPING = (scripts.STAGE.sha.encode(), scripts.TRIM.sha.encode())
APPENDING = scripts.APPEND.sha.encode()
FAR_S = 0.010
"""One way: a Redis 20 ms away."""
SLOW_S = 10.0
"""When an answer takes so long after a fault, the run prints how everybody is."""


@dataclass
class Report:
    """What a run did.

    Attributes:
        landed: rounds by fault.
        in_flight: steps under way at each kill or pause: unanswered, or waited for until they are durable.
        recovery_s: seconds from the end of each fault to the next answer, and the fault.
    """

    landed: Counter[Fault] = field(default_factory=Counter)
    in_flight: list[int] = field(default_factory=list)
    recovery_s: list[tuple[float, str]] = field(default_factory=list)

    @property
    def recovery(self) -> str:
        """How soon trainers were answered again, in words."""
        longest, fault = max(self.recovery_s)
        median = np.median([seconds for seconds, _ in self.recovery_s])
        return f"median {median:.2f} s, longest {longest:.2f} s ({fault})"


class KillRun:
    """Trainers, a server behind a proxy, and its Redis behind another."""

    def __init__(self, directory: Path, zygote: Zygote, *, seed: int, durability: str) -> None:
        self.seed = seed
        self.random = np.random.default_rng([seed, 1])
        self.rule = RULES[seed % len(RULES)]
        self.history = History()
        self.report = Report()
        self._orderly: set[int] = set()
        # As the server's own Redis: it writes before it answers. Only a loss of power could tell whether it was synced.
        self.redis = RedisServer(directory / "redis", appendfsync="no")
        self.redis.start()
        self.to_redis = FaultProxy(("127.0.0.1", self.redis.port))
        self.server = ForkedServer(
            zygote,
            directory / "server",
            redis_url=f"redis://{self.to_redis.address}",
            sweep_min_bytes=SWEEP_MIN_BYTES,
            max_backlog_bytes=1
            << 30,  # else the tables are written anew, and the log, which the checker reads, has gaps
            redis_timeout_s=0.5,
        )
        self.server.start()
        self.to_server = FaultProxy(("127.0.0.1", int(self.server.address.rpartition(":")[2])))
        with PolicyClient(
            self.server.address, policy=POLICY, num_examples=NUM_EXAMPLES, rule=self.rule, durability=durability
        ) as client:
            client.read([0])
        self.trainers: list[Trainer] = [
            kind(
                self.to_server.address,
                policy=POLICY,
                num_examples=NUM_EXAMPLES,
                history=self.history,
                seed=seed + number,
            )
            for number, kind in enumerate(KINDS)
        ]

    def run(self, schedule: list[Fault]) -> None:
        """Lands every fault of the schedule, then lets the trainers end."""
        for trainer in self.trainers:
            trainer.start()
        self._wait_for_answers()
        for fault in schedule:
            self._land(fault)
            ended = monotonic()
            self._wait_for_answers(after=f"{fault.value}, round {sum(self.report.landed.values()) + 1}")
            self.report.recovery_s.append((monotonic() - ended, fault.value))
            self.report.landed[fault] += 1
        for trainer in self.trainers:
            trainer.stop()
        for trainer in self.trainers:
            try:
                trainer.join()
            except AssertionError as error:
                raise AssertionError(f"{error}\n{postmortem(self.server, self.trainers)}") from error

    def close(self) -> None:
        """Ends every process."""
        for trainer in self.trainers:
            trainer.stop()
        self.server.kill()
        self.to_server.close()
        self.to_redis.close()
        self.redis.kill()

    @property
    def log(self) -> Log:
        """The policy's log as Redis took it."""
        return read_log(self.redis.append_only_file, policy=POLICY)

    def check(self) -> Findings:
        """What the checker finds, after the run; the server's own tables are compared too."""
        rule = build(self.rule, {})
        findings = check(self.history, self.log, rule=rule, num_examples=NUM_EXAMPLES, orderly=self._orderly)
        for trainer in self.trainers:
            for stats in trainer.stats:
                if stats.lost or stats.regressions or stats.forgotten:
                    findings.violations.append(f"{trainer.trainer_id}: {stats}")
        archive = self._export(POLICY)
        for name, column in findings.model.state.columns.items():
            if column.numpy().tobytes() != archive.columns[name].tobytes():
                findings.violations.append(f"at the end, column {name!r} of the server is not the model's")
        if archive.version != findings.model.version:
            findings.violations.append(
                f"the server is at version {archive.version}, the log at {len(self.log.entries)}"
            )
        return findings

    def uninterrupted(self) -> tuple[PolicyArchive, PolicyArchive]:
        """The policy as the run left it, and one to which the same steps were sent in the same order without faults."""
        with PolicyClient(
            self.server.address, policy="calm", num_examples=NUM_EXAMPLES, rule=self.rule, when_lost="wait"
        ) as client:
            for position, entry in enumerate(entry for entry in self.log.entries if not entry.refused):
                step = self.history.sent[entry.trainer_id][entry.sequence - 1]
                client.submit(step.ids, **step.fields)  # type: ignore[misc]  # fields by name
                if position % 500 == 0:
                    assert client.flush(60)
            assert client.flush(60, durable=True)
        return self._export(POLICY), self._export("calm")

    def _export(self, policy: str) -> PolicyArchive:
        with PolicyAdmin(self.server.address) as admin, TemporaryDirectory() as directory:
            admin.export_policy(policy, path := Path(directory) / "policy.npz")
            return PolicyArchive.load(path)

    # Rounds.

    def _land(self, fault: Fault) -> None:
        steps: dict[Fault, Callable[[], None]] = {
            Fault.BEFORE_APPEND: lambda: self._kill_at(At.REQUEST),
            Fault.BEFORE_REPLY: lambda: self._kill_at(At.REPLY),
            Fault.BEFORE_ACKNOWLEDGEMENT: self._kill_before_acknowledgement,
            Fault.IN_SWEEP: self._kill_in_sweep,
            Fault.IN_RESTORE: self._kill_in_restore,
            Fault.ANY_TIME: self._kill_any_time,
            Fault.PAUSE: self._pause,
            Fault.PAUSE_AND_KILL: self._pause_and_kill,
            Fault.REDIS_PAUSED: self._pause_redis,
            Fault.REDIS_KILLED: self._kill_redis,
            Fault.BOTH_KILLED: self._kill_both,
            Fault.TRAINERS_CUT: self._cut_trainers,
            Fault.REDIS_CUT: self.to_redis.reset,
            Fault.REDIS_HALF_OPEN: self._black_hole_redis,
            Fault.TRAINER_RESTARTED: self._restart_trainer,
            Fault.REDIS_SLOW: self._slow_redis,
            Fault.REDIS_FULL: self._fill_redis,
            Fault.STOPPED: self._stop,
            Fault.STOPPED_ALONE: self._stop_alone,
        }
        steps[fault]()

    def _kill_at(self, at: At) -> None:
        with self.to_redis.trap(APPENDING, at) as trap:
            self._wait_for(trap.caught.is_set, within_s=120, what="an append comes")
            self._kill()
            self._let_go(trap)
            self.server.start()

    def _let_go(self, trap: object) -> None:
        """What the dead server sent arrives late, or never."""
        self.to_redis.free(trap, drop=bool(self.random.integers(2)))  # type: ignore[arg-type]

    def _kill_before_acknowledgement(self) -> None:
        with self.to_redis.trap(APPENDING, At.REPLY) as trap:
            self._wait_for(trap.caught.is_set, within_s=120, what="an append comes")
            self.to_server.hold(Way.DOWN)
            before = self.to_server.taken[Way.DOWN]
            self.to_redis.free(trap)
            self._wait_for(lambda: self.to_server.taken[Way.DOWN] > before, what="an answer leaves the server")
        self._kill()
        self.to_server.reset()
        self.to_server.release()
        self.server.start()

    def _kill_in_sweep(self) -> None:
        pattern = SWEEPING[int(self.random.integers(len(SWEEPING)))]
        at = (At.REQUEST, At.REPLY)[int(self.random.integers(2))]
        with self._hurry(), self.to_redis.trap(pattern, at) as trap:
            self._wait_for(trap.caught.is_set, within_s=60, what="a sweep comes")
            self._kill()
            self._let_go(trap)
        self.server.start()
        self._wait_for_sweep(after=log_start(self.redis, POLICY))

    def _kill_in_restore(self) -> None:
        self._kill()
        pattern = RESTORING[int(self.random.integers(len(RESTORING)))]
        at = (At.REQUEST, At.REPLY)[int(self.random.integers(2))]
        with self.to_redis.trap(pattern, at) as trap:
            self.server.start()
            self._wait_for(trap.caught.is_set, within_s=120, what="a restore comes")
            self._kill()
            self._let_go(trap)
        self.server.start()

    def _kill_any_time(self) -> None:
        sleep(self.random.uniform(0, 0.05))
        self._kill()
        sleep(self.random.uniform(0, 0.05))
        self.server.start()

    def _pause(self) -> None:
        self._signal_in_flight(self.server.pid, signal.SIGSTOP)
        sleep(self.random.uniform(0.05, 1.2))
        self.server.resume()

    def _pause_and_kill(self) -> None:
        self._signal_in_flight(self.server.pid, signal.SIGSTOP)
        sleep(self.random.uniform(0.05, 0.3))
        self.server.kill()
        self.server.start()

    def _pause_redis(self) -> None:
        self._signal_in_flight(self.redis.pid, signal.SIGSTOP)
        sleep(self.random.uniform(0.05, 0.8))
        os.kill(self.redis.pid, signal.SIGCONT)

    def _kill_redis(self) -> None:
        self._signal_in_flight(self.redis.pid, signal.SIGKILL)
        self.redis.kill()
        sleep(self.random.uniform(0, 0.2))
        self.redis.start()

    def _kill_both(self) -> None:
        """Nobody is left who could write again what was acknowledged."""
        self._signal_in_flight(self.server.pid, signal.SIGSTOP)
        self.redis.kill()
        self.server.kill()
        self.redis.start()
        self.server.start()

    def _cut_trainers(self) -> None:
        self.to_server.cut_after(int(self.random.integers(1, 2000)), (Way.UP, Way.DOWN)[int(self.random.integers(2))])
        sleep(0.02)
        self.to_server.reset()

    def _black_hole_redis(self) -> None:
        self.to_redis.hold()
        sleep(self.random.uniform(0.05, 1.0))
        if self.random.integers(2):
            self.to_redis.reset()
        self.to_redis.release()

    def _restart_trainer(self) -> None:
        able = [trainer for trainer in self.trainers if not isinstance(trainer, Async)]
        able[int(self.random.integers(len(able)))].restart()

    def _slow_redis(self) -> None:
        with self._hurry() if self.random.integers(2) else nullcontext(), self._redis_far_away():
            sleep(self.random.uniform(1.0, 3.0))

    def _fill_redis(self) -> None:
        # Not for long: once more has come than the memory for the log holds, the tables are written anew, and the log
        # in Redis, which the checker reads, has a gap.
        with self.to_redis.trap(SWEEPING[0], At.REQUEST) as trap:
            with self._hurry():
                self._wait_for(trap.caught.is_set, within_s=60, what="a sweep comes")
            before = log_start(self.redis, POLICY)
            self.redis.command("CONFIG", "SET", "maxmemory", "1mb")
        sleep(self.random.uniform(0.2, 1.5))
        self.redis.command("CONFIG", "SET", "maxmemory", 0)
        self._wait_for_sweep(after=before)

    def _stop(self) -> None:
        """What was answered before is in the log, whatever the durability: the checker looks."""
        epoch = self._epoch
        status = self.server.stop()
        assert status == 0, f"exit status {status}\n{postmortem(self.server, self.trainers)}"
        self._orderly.add(epoch)
        self.server.start()

    def _stop_alone(self) -> None:
        """With durability `behind` the server has something left to write."""
        with self._redis_far_away():
            with self._hurry():
                sleep(self.random.uniform(0.2, 0.6))
                self.to_server.refuse()
                self._wait_for(self._is_alone, what="no stream is open")
            self._stop()
        self.to_server.accept()

    def _is_alone(self) -> bool:
        self.to_server.reset()  # what was on its way to the server when it was cut off, too
        return gauges(self.server)["active_streams"] == 0

    @property
    def _epoch(self) -> int:
        """Of the policy's owner, as Redis has it."""
        with self.redis.client() as client:
            (owner,) = client.scan_iter(f"*{{{POLICY}}}*:owner")
            return int(client.hget(owner, "epoch") or 0)

    def _wait_for_sweep(self, *, after: int) -> None:
        self._wait_for(lambda: log_start(self.redis, POLICY) > after, within_s=60, what="a sweep ends well")

    def _kill(self) -> None:
        self._signal_in_flight(self.server.pid, signal.SIGKILL)
        self.server.kill()

    def _signal_in_flight(self, pid: int, number: signal.Signals) -> None:
        """Lands a signal while a step is in flight."""
        self._wait_for(lambda: self._in_flight, what="a step is in flight")
        os.kill(pid, number)
        self.report.in_flight.append(self._in_flight)

    @property
    def _in_flight(self) -> int:
        return sum(trainer.in_flight or trainer.awaited for trainer in self.trainers)

    def _wait_for_answers(self, *, after: str = "the start") -> None:
        """Every fault ends in answers of the server to every trainer."""
        before = {trainer.trainer_id: self._served(trainer) for trainer in self.trainers}
        tells_at = monotonic() + SLOW_S

        def tell() -> None:
            nonlocal tells_at
            if monotonic() > tells_at:
                tells_at = float("inf")
                print(f"no answer for {SLOW_S} s after {after}\n{postmortem(self.server, self.trainers)}")

        for trainer in self.trainers:
            self._wait_for(
                lambda trainer=trainer: (
                    tell() or trainer.failure or self._served(trainer) > before[trainer.trainer_id]  # type: ignore[misc]
                ),
                within_s=120,
                what=f"{trainer.trainer_id} is answered after {after}",
            )

    def _wait_for(self, condition: Callable[[], object], *, within_s: float = 30.0, what: str) -> None:
        """Waits for a condition; when it does not come about, says how everybody was."""
        until(condition, within_s=within_s, what=lambda: f"{what}\n{postmortem(self.server, self.trainers)}")

    def _served(self, trainer: Trainer) -> int:
        return sum(stats.applied + stats.duplicates for stats in trainer.stats)

    @contextmanager
    def _redis_far_away(self) -> Iterator[None]:
        self.to_redis.delay_s = FAR_S
        try:
            yield
        finally:
            self.to_redis.delay_s = 0.0

    @contextmanager
    def _hurry(self) -> Iterator[None]:
        for trainer in self.trainers:
            trainer.hurry.set()
        try:
            yield
        finally:
            for trainer in self.trainers:
                trainer.hurry.clear()
