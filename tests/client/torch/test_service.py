"""A training loop with a real server: mislabelled examples lose their weight, by every method."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from equipoise import PolicyClient
from equipoise.testing import ServerProcess, serve
from equipoise.torch import (
    FiniteDifferenceContributions,
    GhostContributions,
    OnePassContributions,
    TargetDirection,
    weighted_mean,
)

COUNT, FLIPPED = 200, 50


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with serve() as running:
        yield running


def losses_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def problem() -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A model, training examples of which the first have the wrong label, and target examples."""
    torch.manual_seed(0)
    truth = torch.randn(8)
    x, target = torch.randn(COUNT, 8), torch.randn(128, 8)
    y = (x @ truth > 0).long()
    y[:FLIPPED] = 1 - y[:FLIPPED]
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2)), (x, y), (target, (target @ truth > 0).long())


@pytest.mark.parametrize("method", [GhostContributions, FiniteDifferenceContributions, OnePassContributions])
def test_mislabelled_examples_lose_their_weight(server: ServerProcess, method: Any) -> None:
    model, (x, y), target = problem()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    direction = TargetDirection(model, losses_of, [target], preconditioner=optimizer, guard_batches=[target])
    contributions = method(model, direction)
    name = f"torch-{method.__name__.lower()}"
    with PolicyClient(server.address, policy=name, num_examples=COUNT, rule="ema_sign") as client:
        for step in range(60):
            ids = np.random.default_rng(step).choice(COUNT, 40, replace=False)
            with contributions.capture(ids) as capture:
                losses = capture.losses((x[ids], y[ids]))
                if method is GhostContributions:  # the weights of the last visit; nothing waits for the network
                    weighted_mean(losses, client.weights(ids)).backward()
                    client.submit(ids, **capture.fields())
                elif method is FiniteDifferenceContributions:
                    weighted_mean(losses, client.step(ids, **capture.fields()).weights).backward()
                else:
                    capture.backward(client.step(ids, **capture.fields()).weights)
            optimizer.step()
            optimizer.zero_grad()
        assert client.flush(10)
        weights = client.read_weights()
        status = client.status()
    assert weights[:FLIPPED].mean() < 0.5 * weights[FLIPPED:].mean()
    assert status.version == 60
    assert status.guard_loss == pytest.approx(status.target_loss, rel=1e-5)
