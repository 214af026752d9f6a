"""A loop's part in a few lines: which weights it trains under, what it sends and when."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from equipoise.torch import (
    CaptureError,
    FiniteDifferenceContributions,
    GhostContributions,
    OnePassContributions,
    TargetDirection,
    WeightedSteps,
    look_ahead,
)
from tests.client.torch.models import reference, relative_error

COUNT = 4


class Notebook:
    """Weights as given, statistics as they come."""

    def __init__(self) -> None:
        self.sent: list[tuple[list[int], dict[str, Any]]] = []

    def weights(self, ids: ArrayLike) -> NDArray[np.float32]:
        return np.asarray(ids, np.float32) / 10

    def submit(self, ids: ArrayLike | None = None, **fields: Any) -> None:
        self.sent.append((np.asarray(ids).tolist(), fields))


def losses_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean(1)


def problem() -> tuple[nn.Module, TargetDirection, Tensor]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return model, TargetDirection(model, losses_of, [torch.randn(5, 3)]), torch.randn(COUNT, 3)


@pytest.mark.parametrize(
    ("method", "own"), [(GhostContributions, False), (GhostContributions, True), (FiniteDifferenceContributions, False)]
)
def test_a_step_trains_under_the_newest_weights_and_sends_its_statistics(method: Any, own: bool) -> None:
    model, direction, x = problem()
    policy, ids = Notebook(), [7, 3, 9, 1]
    steps = WeightedSteps(policy, method(model, direction))
    with steps.capture(torch.tensor(ids)) as step:
        (step.weigh(losses_of(model, x)) if own else step.loss(x)).backward()
        assert policy.sent == []
    weights = torch.tensor(ids) / 10
    [gradient, *_] = torch.autograd.grad((weights * losses_of(model, x)).mean(), list(model.parameters()))
    torch.testing.assert_close(model.weight.grad, gradient)
    [(sent, fields)] = policy.sent
    assert sent == ids
    assert relative_error(torch.tensor(fields["contributions"]), reference(model, direction, x)) < 0.01
    torch.testing.assert_close(torch.tensor(fields["losses"]), losses_of(model, x).detach())
    assert fields.keys() == {"contributions", "losses", "scored", "target_loss"}


def test_micro_batches_are_one_step() -> None:
    model, direction, x = problem()
    policy = Notebook()
    steps = WeightedSteps(policy, GhostContributions(model, direction), accumulate=2)
    for ids in ([5, 6], [7, 8]):
        with steps.capture(ids, upcoming=[ids[0] + 10]) as step:
            step.loss(x[[i - 5 for i in ids]]).backward()
    weights = torch.tensor([5, 6, 7, 8]) / 10
    [gradient, *_] = torch.autograd.grad((weights * losses_of(model, x)).mean(), list(model.parameters()))
    torch.testing.assert_close(model.weight.grad, gradient)
    [(ids, fields)] = policy.sent
    assert ids == [5, 6, 7, 8]
    assert fields["weights_for"].tolist() == [15, 17]
    assert relative_error(torch.tensor(fields["contributions"]), reference(model, direction, x)) < 1e-4


def test_a_loop_that_scales_and_sends_itself() -> None:
    model, direction, x = problem()
    policy = Notebook()
    steps = WeightedSteps(policy, GhostContributions(model, direction), accumulate=None)
    steps.submit(step=1)
    for _ in range(2):
        with steps.capture(range(COUNT)) as step:
            step.loss(x).backward()
    assert policy.sent == []
    steps.submit(step=2)
    [(ids, fields)] = policy.sent
    assert (ids, fields["step"]) == ([0, 1, 2, 3] * 2, 2)


def test_sampled_examples_are_not_weighted_again() -> None:
    model, direction, x = problem()
    policy = Notebook()
    with WeightedSteps(policy, GhostContributions(model, direction), sampled=True).capture(range(COUNT)) as step:
        step.loss(x).backward()
    [gradient, *_] = torch.autograd.grad(losses_of(model, x).mean(), list(model.parameters()))
    torch.testing.assert_close(model.weight.grad, gradient)
    assert len(policy.sent) == 1


def test_what_failed_is_not_sent() -> None:
    model, direction, x = problem()
    policy = Notebook()
    steps = WeightedSteps(policy, GhostContributions(model, direction))
    step = steps.capture(range(COUNT))
    with pytest.raises(ZeroDivisionError), step:
        _ = step.loss(x).backward() or 1 / 0
    with pytest.raises(CaptureError, match="no backward pass was captured"), steps.capture(range(COUNT)) as step:
        step.loss(x)
    assert policy.sent == []
    assert not model._forward_hooks


def test_wrong_arguments_are_named() -> None:
    model, direction, _ = problem()
    with pytest.raises(CaptureError, match="contributions = OnePassContributions: makes its own backward pass"):
        WeightedSteps(Notebook(), OnePassContributions(model, direction))
    with pytest.raises(CaptureError, match="accumulate = 0: must be at least 1"):
        WeightedSteps(Notebook(), GhostContributions(model, direction), accumulate=0)


@pytest.mark.parametrize(
    ("given", "expected"),
    [("", []), ("a", [("a", None)]), ("abc", [("a", "b"), ("b", "c"), ("c", None)])],
)
def test_looking_ahead(given: str, expected: list[tuple[str, str | None]]) -> None:
    assert list(look_ahead(given)) == expected
