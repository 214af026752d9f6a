"""A training loop with a real server: mislabelled examples lose their weight, by every method."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from equipoise import PolicyClient
from equipoise.torch import (
    FiniteDifferenceContributions,
    GhostContributions,
    OnePassContributions,
    TargetDirection,
    WeightedSteps,
    look_ahead,
    weighted_mean,
)
from tests.delay_proxy import delayed
from tests.patience import PATIENT
from tests.servers import ServerProcess

COUNT, FLIPPED = 200, 50


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
    with PolicyClient(server.address, policy=name, num_examples=COUNT, rule="ema_sign", timeout=PATIENT) as client:
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
        assert client.flush(60)
        weights = client.read_weights()
        status = client.status()
    assert weights[:FLIPPED].mean() < 0.5 * weights[FLIPPED:].mean()
    assert status.version == 60
    assert status.guard_loss == pytest.approx(status.target_loss, rel=1e-5)


def batches(count: int) -> list[Any]:
    """Ids, the same ones seldom twice in a row."""
    return [np.random.default_rng(step).choice(COUNT, 40, replace=False) for step in range(count)]


def test_looking_ahead_trains_under_the_weights_of_the_step_before(server: ServerProcess) -> None:
    """From a far server too: those of all examples as they stood right after it, not those of their last visit."""
    model, (x, y), target = problem()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    steps_of = GhostContributions(model, TargetDirection(model, losses_of, [target]))
    with (
        delayed(server.address, one_way_s=0.05) as far,
        PolicyClient(far, policy="ahead", num_examples=COUNT, rule="ema_sign", timeout=PATIENT) as client,
        PolicyClient(server.address, policy="ahead", timeout=PATIENT) as near,
    ):
        steps = WeightedSteps(client, steps_of)
        served, used = np.ones(COUNT, np.float32), []
        for ids, following in look_ahead(batches(8)):
            with steps.capture(ids, upcoming=following) as step:
                step.loss((x[ids], y[ids])).backward()
            used.append(step.weights)
            np.testing.assert_array_equal(step.weights, served[ids])
            optimizer.step()
            optimizer.zero_grad()
            assert client.flush(60)
            served = near.read_weights()
        assert len({float(weight) for weights in used for weight in weights}) > 4
        assert client.stats.fallbacks == 0


def test_weights_are_used_no_longer_than_they_may(server: ServerProcess) -> None:
    """A server that falls silent costs no time; after `max_staleness` steps training is uniform, and then as before."""
    model, (x, y), target = problem()
    steps_of = GhostContributions(model, TargetDirection(model, losses_of, [target]))
    with PolicyClient(
        server.address, policy="stale", num_examples=COUNT, rule="ema_sign", max_staleness=3, timeout=PATIENT
    ) as client:
        steps, ids = WeightedSteps(client, steps_of), np.arange(COUNT)

        def weights() -> Any:
            with steps.capture(ids, upcoming=ids) as step:
                step.loss((x, y)).backward()
            return step.weights

        weights()
        assert client.flush(60)
        learnt = client.weights(ids)
        assert learnt.min() < 1 < learnt.max()
        server.pause()
        try:
            seen = [weights() for _ in range(6)]
        finally:
            server.resume()
        for known in seen[:4]:
            np.testing.assert_array_equal(known, learnt)
        for unknown in seen[4:]:
            np.testing.assert_array_equal(unknown, 1.0)
        assert client.flush(60)
        assert (client.stats.applied, client.stats.dropped) == (7, 0)
        assert weights().min() < 1
