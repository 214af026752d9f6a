"""Two servers that share a Redis: the trainer in Node.js follows its policy from one to the other."""

from pathlib import Path

import numpy as np
import pytest

from equipoise import PolicyClient
from tests.e2e.faults.house import House
from tests.e2e.faults.proxy import until
from tests.patience import PATIENT
from tests.typescript.node import Trainer, float32s, uint64s

pytestmark = pytest.mark.slow


def test_a_policy_that_moves_is_followed(house: House, tmp_path: Path) -> None:
    """The owner stops in order; the trainer is asked to leave, and told who owns the policy then."""
    other, to_other = house.serve()
    options = {"policy": "moves", "numExamples": 100, "whenLost": "wait"}
    addresses = f"{house.address},{to_other.address}"
    trainer = Trainer(tmp_path, {"address": addresses, "options": options, "seed": 1, "pauseMs": 4, "rows": 8})
    try:
        until(lambda: trainer.served > 5, what=lambda: f"answers\n{trainer.log}")
        assert house.server.stop() == 0
        moved = trainer.served
        until(lambda: trainer.served > moved + 5, within_s=60, what=lambda: f"answers of the other\n{trainer.log}")
        end = trainer.stop(within_s=60)
    finally:
        trainer.kill()
    assert end["durable"]
    assert end["stats"]["lost"] == end["stats"]["regressions"] == 0
    made = sorted(trainer.steps, key=lambda step: int(step["step"]))
    with PolicyClient(other.address, policy="reference", num_examples=100, when_lost="wait") as reference:
        for step in made:
            reference.step(uint64s(step["ids"]), contributions=float32s(step["contributions"]))
        with PolicyClient(other.address, policy="moves", timeout=PATIENT) as moved_policy:
            assert moved_policy.status().version == len(made)
            np.testing.assert_array_equal(moved_policy.read_weights(), reference.read_weights())


def test_the_owner_is_found_from_any_server(house: House, tmp_path: Path) -> None:
    _, to_other = house.serve()
    with PolicyClient(house.address, policy="owned", num_examples=100, timeout=PATIENT) as client:
        client.step([0], contributions=[1.0])
        options = {"policy": "owned", "numExamples": 100, "whenLost": "wait"}
        job = {"address": to_other.address, "options": options, "seed": 1, "pauseMs": 4, "rows": 8}
        trainer = Trainer(tmp_path, job)
        try:
            until(lambda: trainer.served > 5, what=lambda: f"answers\n{trainer.log}")
            end = trainer.stop(within_s=60)
        finally:
            trainer.kill()
        assert end["durable"]
        assert client.status().version == 1 + len(trainer.steps)
