"""Trainers that come and go: processes of their own, which end well or by SIGKILL."""

import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np

from equipoise import Limits, PolicyAdmin, PolicyClient, PolicySpec
from equipoise.errors import EquipoiseError

NUM_EXAMPLES = 50_000
ROWS = 256
PAUSE_S = 0.02
BURST_STEPS, BURST_ROWS, BURST_EVERY_S = 100, 8192, 4.0
"""10 MB, which a Redis 20 ms away takes in two seconds."""
POLICIES = ("soak-a", "soak-b")
PASSING = ("passing-1", "passing-2", "passing-3")
"""Names of policies that visitors create and delete again and again."""


class Trainer:
    """One trainer's process: `steady` or `bursting` until it is stopped, or a `visitor`, who does other things too."""

    def __init__(self, kind: str, address: str, *, seed: int) -> None:
        command = [sys.executable, "-m", "tests.e2e.soak.trainers", kind, address, str(seed)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def kill(self) -> None:
        """Ends it in the middle of whatever it does."""
        self._process.send_signal(signal.SIGKILL)
        self._process.communicate()

    def stop(self, timeout_s: float = 60) -> str:
        """Asks it to end; what it has to say about its life, empty if nothing is wrong."""
        try:
            said, _ = self._process.communicate("stop\n", timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            return f"the trainer did not end within {timeout_s} s"
        return said.strip() or (f"exit status {self._process.returncode}" if self._process.returncode else "")


def live(kind: str, address: str, seed: int) -> str:
    """A trainer's life, until a line comes in; what was wrong with it."""
    chance = random.Random(seed)
    asked = _Asked()
    limits = Limits(window_steps=512, cached_examples=NUM_EXAMPLES)
    policy = POLICIES[seed % len(POLICIES)]
    with PolicyClient(address, policy=policy, num_examples=NUM_EXAMPLES, limits=limits) as client:
        while not asked.to_stop():
            if kind == "bursting":
                _burst(client, chance)
                asked.wait(BURST_EVERY_S)
                continue
            ids = np.array([chance.randrange(NUM_EXAMPLES) for _ in range(ROWS)])
            contributions = np.array([chance.gauss(0, 1) for _ in range(ROWS)], np.float32)
            if chance.random() < 0.5:
                client.step(ids, contributions=contributions, target_loss=chance.random())
            else:
                client.submit(ids, contributions=contributions)
            if kind == "visitor" and chance.random() < 0.05:
                _look_around(address, policy, chance)
            time.sleep(PAUSE_S)
        stats = client.stats
    wrong = {name: getattr(stats, name) for name in ("lost", "regressions", "refused") if getattr(stats, name)}
    return f"after {stats.steps} steps: {wrong}" if wrong else ""


def _burst(client: PolicyClient, chance: random.Random) -> None:
    """More at once than the server keeps in memory, as fast as it goes."""
    random_rows = np.random.default_rng(chance.randrange(2**31))
    for _ in range(BURST_STEPS):
        ids = random_rows.integers(0, NUM_EXAMPLES, BURST_ROWS)
        client.submit(ids, contributions=random_rows.standard_normal(BURST_ROWS).astype(np.float32))


def _look_around(address: str, policy: str, chance: random.Random) -> None:
    """Calls beside the training; a lost server is no news here."""
    try:
        with PolicyAdmin(address, timeout=5) as admin:
            next(admin.watch(policy, min_interval=0.1))
            admin.read_weights(policy)
            admin.sample_examples(policy, 10)
            passing = chance.choice(PASSING)
            admin.create(PolicySpec(name=passing, num_examples=100))
            if chance.random() < 0.7:
                admin.delete(passing)
    except EquipoiseError:
        return


class _Asked:
    """Whether somebody has written a line to us."""

    def __init__(self) -> None:
        self._event = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        sys.stdin.readline()
        self._event.set()

    def to_stop(self) -> bool:
        return self._event.is_set()

    def wait(self, seconds: float) -> None:
        self._event.wait(seconds)


if __name__ == "__main__":
    print(live(sys.argv[1], sys.argv[2], int(sys.argv[3])))
