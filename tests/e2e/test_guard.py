"""The guard through a server: a run that weights hurt, watched, exported, forked, killed."""

import urllib.request
from pathlib import Path

import numpy as np
import pytest

from equipoise import EquipoiseError, PolicyAdmin, PolicyClient, PolicySpec
from tests.patience import PATIENT
from tests.servers import ServerProcess, serve

NUM_EXAMPLES = 64


class Run:
    """A made-up training run whose guard loss falls faster under uniform weights."""

    def __init__(self, client: PolicyClient) -> None:
        self.client = client
        self.loss = 3.0
        self.random = np.random.default_rng(0)

    def train(self, steps: int) -> list[float]:
        """The guard strengths that the weights show: 1 where all are 1."""
        strengths = []
        for _ in range(steps):
            contributions = np.sin(np.arange(NUM_EXAMPLES)) + 0.1 * self.random.standard_normal(NUM_EXAMPLES)
            weights = self.client.step(
                None, all_examples=True, contributions=contributions.astype(np.float32), guard_loss=self.loss
            ).weights
            uniform = bool((weights == 1.0).all())
            strengths.append(float(uniform))
            self.loss *= 0.98 if uniform else 0.99
        return strengths


def test_a_policy_that_hurts_goes_back_to_uniform_and_stays_there(server: ServerProcess) -> None:
    with PolicyClient(server.address, policy="guarded", num_examples=NUM_EXAMPLES, timeout=PATIENT) as client:
        strengths = Run(client).train(200)
    with PolicyAdmin(server.address) as admin:
        status = admin.get("guarded")
    assert strengths[:7] == [0.0] * 7
    assert np.mean(strengths) > 0.7
    assert strengths[-1] == status.guard_strength == 1.0
    assert status.guard_trials_lost > 0
    assert status.guard_trials_won < status.guard_trials_lost
    assert status.effective_examples == pytest.approx(NUM_EXAMPLES)
    assert status.spec.settings["guard"] is True
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=60) as page:
        assert 'equipoise_server_guard_strength{policy="guarded"} 1.0' in page.read().decode()


def test_without_the_guard_the_weights_are_served(server: ServerProcess) -> None:
    with PolicyClient(
        server.address, policy="unguarded", num_examples=NUM_EXAMPLES, settings={"guard": False}, timeout=PATIENT
    ) as client:
        assert Run(client).train(40) == [0.0] * 40


def test_copies_go_on_as_the_original_does(server: ServerProcess, tmp_path: Path) -> None:
    with PolicyClient(server.address, policy="copied", num_examples=NUM_EXAMPLES, timeout=PATIENT) as client:
        run = Run(client)
        run.train(25)
        client.flush(durable=True)
        with PolicyAdmin(server.address) as admin:
            admin.export_policy("copied", tmp_path / "copied.npz")
            admin.import_policy(tmp_path / "copied.npz", "imported")
            admin.fork("copied", "forked")
        before, random = run.loss, run.random.bit_generator.state
        expected = run.train(60)
        assert set(expected) == {0.0, 1.0}
        for name in ("imported", "forked"):
            with PolicyClient(server.address, policy=name, num_examples=NUM_EXAMPLES, timeout=PATIENT) as other:
                run = Run(other)
                run.loss, run.random.bit_generator.state = before, random
                assert run.train(60) == expected


def test_a_guard_that_nobody_can_have_is_refused(server: ServerProcess, tmp_path: Path) -> None:
    path = tmp_path / "wrong.npz"
    with PolicyAdmin(server.address) as admin:
        admin.create(PolicySpec(name="wrong", num_examples=NUM_EXAMPLES))
        admin.export_policy("wrong", path)
        with np.load(path) as file:
            arrays = dict(file)
        arrays["scalars/guard.count"] = np.array(0.5)
        np.savez(path, **arrays)
        with pytest.raises(EquipoiseError, match=r"guard.count = 0.5: must be a whole number"):
            admin.import_policy(path, "wrong-again")


def test_a_run_whose_server_is_killed_keeps_its_guard() -> None:
    with serve() as server:
        strengths = []
        for name, kill in (("spared", False), ("killed", True)):
            with PolicyClient(server.address, policy=name, num_examples=NUM_EXAMPLES, when_lost="wait") as client:
                run = Run(client)
                first = run.train(33)
                if kill:
                    server.kill()
                    server.start()
                strengths.append(first + run.train(40))
        assert strengths[0] == strengths[1]
        assert set(strengths[0]) == {0.0, 1.0}
