"""What must work after every fault."""

from pathlib import Path

import numpy as np

from equipoise import PolicyClient
from tests.e2e.faults.training import Training


def assert_all_is_well(training: Training, address: str, directory: Path) -> None:
    """After the loop has ended: nothing is lost, and state dict, import, export and forks of the policy work."""
    training.assert_kept()
    assert training.closed_in_s < 20.0  # 5 s is promised
    policy = training.client.policy
    state = training.client.state_dict()
    with PolicyClient(address, policy=policy, when_lost="wait") as client:
        client.load_state_dict(state)
        result = client.step([0, 1], contributions=[1.0, -1.0])
        assert result.version == training.sent + 1
        assert client.flush(30, durable=True)
        weights = client.read_weights()
        client.admin.fork(policy, f"{policy}-fork")
        client.admin.export_policy(policy, directory / "policy.npz")
        client.admin.import_policy(directory / "policy.npz", f"{policy}-import")
        for name in (f"{policy}-fork", f"{policy}-import"):
            np.testing.assert_array_equal(client.admin.read_weights(name), weights)
