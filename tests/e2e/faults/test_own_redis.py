"""The server's own Redis, with the settings of the product, killed together with the server."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from equipoise import PolicyClient, StepResult
from tests.e2e.faults.zygote import ForkedServer, Zygote

NUM_EXAMPLES = 1000
ROWS = 64


@pytest.fixture
def server(tmp_path: Path, zygote: Zygote) -> Iterator[ForkedServer]:
    forked = ForkedServer(zygote, tmp_path / "server", data_dir=tmp_path / "data")
    forked.start()
    yield forked
    forked.kill()


def train(client: PolicyClient, random: np.random.Generator, steps: int) -> StepResult:
    """The last of some steps."""
    for _ in range(steps):
        result = client.step(
            random.integers(0, NUM_EXAMPLES, ROWS), contributions=random.standard_normal(ROWS).astype(np.float32)
        )
    return result


@pytest.mark.parametrize("kills", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_what_was_acknowledged_as_durable_survives_the_death_of_both(server: ForkedServer, kills: int) -> None:
    random = np.random.default_rng(kills)
    for _ in range(kills):
        with PolicyClient(server.address, policy="p", num_examples=NUM_EXAMPLES, when_lost="wait") as client:
            result = train(client, random, int(random.integers(1, 50)))
            assert client.flush(30, durable=True)
            weights = client.read_weights()
            server.kill_both()
        server.start()
        # A new trainer, which brings nothing of its own.
        with PolicyClient(server.address, policy="p", when_lost="wait") as client:
            assert client.status().version == result.version
            np.testing.assert_array_equal(client.read_weights(), weights)
