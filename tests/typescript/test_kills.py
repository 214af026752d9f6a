"""A trainer in Node.js whose server, and its Redis, are killed at random: at the end nothing shows of it."""

from collections import Counter
from pathlib import Path
from time import monotonic, sleep

import numpy as np
import pytest

from equipoise import PolicyClient
from tests.e2e.faults.proxy import until
from tests.e2e.faults.zygote import ForkedServer
from tests.patience import PATIENT
from tests.typescript.node import Trainer, float32s, uint64s

NUM_EXAMPLES = 500
OPTIONS = {
    "policy": "killed",
    "numExamples": NUM_EXAMPLES,
    "rule": "ema_sign",
    "backoff": {"firstMs": 20, "longestMs": 250},
    "limits": {"windowSteps": 1 << 16},  # room for every step without a server: dropped ones would be no replay
}


@pytest.mark.parametrize(("when_lost", "durability"), [("wait", "logged"), ("continue", "behind")])
@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_a_policy_is_bit_for_bit_what_an_undisturbed_run_makes(
    forked: ForkedServer, tmp_path: Path, when_lost: str, durability: str, kills: int
) -> None:
    random = np.random.default_rng([kills, when_lost == "wait"])
    started = monotonic()
    job = {
        "address": forked.address,
        "options": {**OPTIONS, "whenLost": when_lost, "durability": durability, "timeouts": {"stepMs": 50}},
        "seed": kills,
        "pauseMs": 6,
        "rows": 16,
    }
    faults = [forked.kill, forked.kill_both]
    schedule = [forked.stop, *(faults[random.integers(2)] for _ in range(kills))]
    random.shuffle(schedule)  # type: ignore[arg-type]  # a list is shuffled in place too
    trainer = Trainer(tmp_path, job)
    try:
        for fault in schedule:
            wait_for_answers(trainer, 5)
            sleep(random.uniform(0, 0.1))  # the moment of the fault
            fault()
            forked.start()
        wait_for_answers(trainer, 1)
        end = trainer.stop(within_s=120)
    finally:
        trainer.kill()
    came = Counter(fault.__name__ for fault in schedule)
    print(f"{when_lost}, {durability}: {dict(came)}, {len(trainer.steps)} steps, {monotonic() - started:.0f} s, {end}")

    stats = end["stats"]
    assert end["durable"]
    assert {stats[name] for name in ("lost", "dropped", "forgotten", "refused", "regressions", "undurable")} == {0}
    assert stats["reconnects"] >= len(schedule)
    assert_as_undisturbed(forked, trainer)


def wait_for_answers(trainer: Trainer, count: int) -> None:
    """Every fault ends in answers of the server."""
    before = trainer.served
    until(lambda: trainer.served >= before + count, within_s=60, what=lambda: f"answers\n{trainer.log}")


def assert_as_undisturbed(server: ForkedServer, trainer: Trainer) -> None:
    """The same steps, in the same order, of a Python client that nothing happens to."""
    made = sorted(trainer.steps, key=lambda step: int(step["step"]))
    assert [step["step"] for step in made] == list(range(1, len(made) + 1))
    with PolicyClient(server.address, policy="undisturbed", num_examples=NUM_EXAMPLES, when_lost="wait") as client:
        for step in made:
            result = client.step(uint64s(step["ids"]), contributions=float32s(step["contributions"]))
            if step.get("outcome") == "applied":
                assert step["version"] == step["sequence"] == result.version
                np.testing.assert_array_equal(float32s(step["weights"]), result.weights)
        with PolicyClient(server.address, policy="killed", timeout=PATIENT) as killed:
            assert killed.status().version == len(made)
            np.testing.assert_array_equal(killed.read_weights(), client.read_weights())
            np.testing.assert_array_equal(killed.read_weights("score"), client.read_weights("score"))
