"""What must work after every fault."""

from pathlib import Path

import numpy as np

from equipoise import PolicyClient
from tests.e2e.faults.training import Training


def assert_all_is_well(training: Training, address: str, directory: Path) -> None:
    """After the loop has ended: nothing is lost, and state dict, import, export and forks of the policy work."""
    stats = training.stats
    assert (stats.lost, stats.regressions, stats.dropped, stats.forgotten, stats.refused) == (0, 0, 0, 0, 0)
    assert training.closed_in_s < 2 * 5.0
    policy = training.client.policy
    state = training.client.state_dict()
    with PolicyClient(address, policy=policy, when_lost="wait") as client:
        client.load_state_dict(state)
        result = client.step([0, 1], contributions=[1.0, -1.0])
        assert result.version == stats.steps + 1
        assert client.flush(30, durable=True)
        weights = client.read_weights()
        client.admin.fork(policy, f"{policy}-fork")
        client.admin.export_policy(policy, directory / "policy.npz")
        client.admin.import_policy(directory / "policy.npz", f"{policy}-import")
        for name in (f"{policy}-fork", f"{policy}-import"):
            np.testing.assert_array_equal(client.admin.read_weights(name), weights)
