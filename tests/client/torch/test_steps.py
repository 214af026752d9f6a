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
    assert (policy.sent, steps.discarded) == ([], 1)
    assert not model._forward_hooks


def test_a_skipped_batch_leaves_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    """Wherever it is skipped, by whatever is there to skip with; the others are as they would be without it."""
    model, direction, x = problem()
    policy = Notebook()
    contributions = GhostContributions(model, direction)
    steps = WeightedSteps(policy, contributions)
    for number in range(6):
        with steps.capture([number] * COUNT) as step:
            if number == 0:
                continue
            loss = step.loss(x)
            assert contributions.coverage.plan is not None
            if number == 2:
                continue
            loss.backward()
            if number == 4:
                step.discard()
        assert not model._forward_hooks
    assert [ids[0] for ids, _ in policy.sent] == [1, 3, 5]
    expected = reference(model, direction, x)
    for _, fields in policy.sent:
        assert relative_error(torch.tensor(fields["contributions"]), expected) < 1e-4
    assert steps.discarded == 3
    assert steps.metrics()["policy/batches_discarded"] == 3
    [record] = [record for record in caplog.records if "has no backward pass" in record.message]
    assert record.levelname == "WARNING"


@pytest.mark.parametrize("method", [GhostContributions, FiniteDifferenceContributions])
def test_a_backward_pass_after_the_block_is_an_error(method: Any) -> None:
    model, direction, x = problem()
    steps = WeightedSteps(Notebook(), method(model, direction))
    with steps.capture(range(COUNT)) as step:
        loss = step.loss(x)
    with pytest.raises(CaptureError, match="the backward pass belongs into the `with` block"):
        loss.backward()
    with steps.capture(range(COUNT)) as step:
        loss = step.loss(x)
        step.discard()
    loss.backward()  # as the message says


def test_training_beside_the_steps_is_an_error() -> None:
    """One who never weighs losses would train without the policy and never know."""
    model, direction, x = problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    policy = Notebook()

    def train(steps: WeightedSteps, *, discard: bool) -> None:
        with steps.capture(range(COUNT)) as step:
            losses_of(model, x).mean().backward()
            if discard:
                step.discard()
        optimizer.step()

    steps = WeightedSteps(policy, GhostContributions(model, direction))
    train(steps, discard=False)
    with pytest.raises(CaptureError, match=r"no step knows of it: .* or `step\.discard\(\)`"):
        train(steps, discard=False)
    steps = WeightedSteps(policy, GhostContributions(model, direction))
    for _ in range(3):
        train(steps, discard=True)
    assert (policy.sent, steps.discarded) == ([], 3)


@pytest.mark.parametrize("counts_skipped", [True, False])
def test_statistics_do_not_straddle_optimizer_steps(counts_skipped: bool) -> None:
    """An epoch's last group is smaller, and a micro-batch fails: each request is of one state of the parameters."""
    model, direction, x = problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    policy = Notebook()
    steps = WeightedSteps(policy, GhostContributions(model, direction), accumulate=4)
    groups: list[list[int]] = [[]]
    for epoch in range(2):
        done = 0
        for number in range(7):
            try:
                with steps.capture([10 * epoch + number] * COUNT) as step:
                    loss = step.loss(x)
                    if number == 1:
                        raise MemoryError
                    loss.backward()
                groups[-1].append(10 * epoch + number)
                done += 1
            except MemoryError:
                done += counts_skipped
            if done == 4:
                done = 0
                optimizer.step()
                groups.append([])
        if groups[-1]:
            optimizer.step()
            groups.append([])
    steps.close()
    assert [sorted(set(ids)) for ids, _ in policy.sent] == groups[:-1]


def test_what_was_not_trained_on_is_not_sent_at_the_end() -> None:
    """Micro-batches whose gradient was never applied."""
    model, direction, x = problem()
    policy = Notebook()
    steps = WeightedSteps(policy, GhostContributions(model, direction), accumulate=2)
    with steps.capture(range(COUNT)) as step:
        step.loss(x).backward()
    steps.close()
    assert policy.sent == []


def test_ids_may_come_with_the_losses() -> None:
    """As where a forward pass of a framework is over before anybody has asked for ids; batches of other sizes too."""
    model, direction, x = problem()
    policy = Notebook()
    steps = WeightedSteps(policy, GhostContributions(model, direction))
    for count in (1, COUNT, COUNT, 2):
        step = steps.begin()
        with pytest.raises(CaptureError, match="ids: are not known yet"):
            _ = step.weights
        step.weigh(losses_of(model, x[:count]), ids=range(1, count + 1)).backward()
        with pytest.raises(CaptureError, match="ids: must be told before the losses"):
            step.capture.identify(range(count))
        step.end()
    steps.begin()
    steps.begin()
    steps.close()
    assert steps.discarded == 2
    assert not model._forward_hooks
    assert [len(ids) for ids, _ in policy.sent] == [1, COUNT, COUNT, 2]
    for ids, fields in policy.sent[2:]:
        found = torch.tensor(fields["contributions"])
        assert relative_error(found, reference(model, direction, x[: len(ids)])) < 1e-4
    assert np.isnan(policy.sent[1][1]["contributions"]).all()  # the first to be told apart: it was not surveyed


class Complete:
    """What an accelerator knows."""

    def __init__(self) -> None:
        self.sync_gradients = False


def test_an_accelerator_says_when_gradients_are_complete() -> None:
    model, direction, x = problem()
    policy, accelerator = Notebook(), Complete()
    steps = WeightedSteps(policy, GhostContributions(model, direction), accelerator=accelerator)
    for number, complete in enumerate([False, False, True, False, True]):
        accelerator.sync_gradients = complete
        with steps.capture([number] * COUNT) as step:
            if number == 2:
                continue
            step.loss(x).backward()
    assert [sorted(set(ids)) for ids, _ in policy.sent] == [[0, 1], [3, 4]]
    with pytest.raises(CaptureError, match="accumulate = 2: must not be given beside accelerator"):
        WeightedSteps(policy, GhostContributions(model, direction), accelerator=accelerator, accumulate=2)


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
