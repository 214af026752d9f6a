"""The target direction: what it is, when it is refreshed, and that it leaves no trace."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from equipoise.torch import DirectionError, GhostContributions, TargetDirection
from tests.client.torch.models import class_losses, gpt2, lm_losses, tokens


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3))


def batch(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=generator), torch.randint(3, (count,), generator=generator)


def mean_gradient(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """Gradient in evaluation mode, by hand."""
    quiet = copy.deepcopy(model).eval()
    return list(torch.autograd.grad(class_losses(quiet, (x, y)).mean(), list(quiet.parameters())))


def test_it_is_the_gradient_of_the_mean_over_all_examples_of_unequal_batches() -> None:
    model, batches = classifier(), [batch(5, 1), batch(2, 2)]
    direction = TargetDirection(model, class_losses, batches, guard_batches=[batch(3, 3), batch(4, 4)])
    direction.refresh()
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    torch.testing.assert_close(list(direction.vectors.values()), mean_gradient(model, x, y))
    quiet = copy.deepcopy(model).eval()
    torch.testing.assert_close(direction.target_loss, class_losses(quiet, (x, y)).mean().detach())
    guard = torch.cat([class_losses(quiet, batch(3, 3)), class_losses(quiet, batch(4, 4))])
    torch.testing.assert_close(direction.guard_loss, guard.mean().detach())


def test_it_is_refreshed_every_so_many_captures_and_reports_losses_then() -> None:
    model = classifier()
    direction = TargetDirection(model, class_losses, [batch(8)], refresh_every=3, guard_batches=[batch(4)])
    contributions, reports, ages = GhostContributions(model, direction), [], []
    for step in range(7):
        with contributions.capture([step, step]) as capture:
            capture.losses(batch(2, step)).mean().backward()
        fields = capture.fields()
        reports.append(("target_loss" in fields, "guard_loss" in fields))
        ages.append(direction.age)
    assert reports == [(step % 3 == 0,) * 2 for step in range(7)]
    assert ages == [0, 1, 2, 0, 1, 2, 0]


def test_it_follows_the_model() -> None:
    model = classifier()
    direction = TargetDirection(model, class_losses, [batch(8)])
    direction.refresh()
    before = list(direction.vectors.values())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    direction.refresh()
    torch.testing.assert_close(list(direction.vectors.values()), mean_gradient(model, *batch(8)))
    assert not torch.allclose(before[0], next(iter(direction.vectors.values())))


def test_batches_take_locks() -> None:
    model, seen = classifier(), []

    def losses_of(model: nn.Module, batch: tuple[int, Tensor]) -> Tensor:
        seen.append(batch[0])
        return model(batch[1]).sum(1)

    batches = [(index, torch.randn(2, 4)) for index in range(3)]
    direction = TargetDirection(model, losses_of, batches, batches_per_refresh=2)
    for _ in range(3):
        direction.refresh()
    assert seen == [0, 1, 2, 0, 1, 2]


def test_it_leaves_no_trace() -> None:
    """Modes, even mixed ones; gradients; optimizer; random numbers, though the loader shuffles."""
    model = gpt2(dropout=0.2)
    model.transformer.h[0].eval()
    optimizer = torch.optim.AdamW(model.parameters())
    lm_losses(model, tokens(3)).mean().backward()
    optimizer.step()
    examples = tokens(6)
    loader = DataLoader(TensorDataset(*examples.values()), batch_size=4, shuffle=True)
    modes = [module.training for module in model.modules()]
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    states, values = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()

    def losses_of(model: nn.Module, batch: list[Tensor]) -> Tensor:
        assert not model.training
        return lm_losses(model, dict(zip(examples, batch, strict=True)))

    TargetDirection(model, losses_of, loader, guard_batches=loader, preconditioner=optimizer).refresh()
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], gradients, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict()["state"], states["state"], rtol=0, atol=0)
    torch.testing.assert_close(dict(model.state_dict()), dict(values), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"foreach": True}, {"capturable": False, "fused": True}])
def test_preconditioned_it_points_where_the_optimizer_would_go(kind: Any, options: dict[str, bool]) -> None:
    """Along it a small gradient changes the target loss as a step of the optimizer with frozen v̂ would."""
    model = classifier().eval()
    optimizer = kind(model.parameters(), lr=1e-2, weight_decay=0, **options)
    for seed in range(5):
        optimizer.zero_grad()
        class_losses(model, batch(6, seed)).mean().backward()
        optimizer.step()
    direction = TargetDirection(model, class_losses, [batch(8, 9)], preconditioner=optimizer)
    direction.refresh()
    for parameter, gradient in zip(model.parameters(), mean_gradient(model, *batch(8, 9)), strict=True):
        state = optimizer.state[parameter]
        second = state["max_exp_avg_sq"] if options.get("amsgrad") else state["exp_avg_sq"]
        expected = gradient / ((second / (1 - 0.999**5)).sqrt() + 1e-8)
        torch.testing.assert_close(direction.vectors[parameter], expected)


def test_learning_rates_of_groups_count_and_what_the_optimizer_leaves_alone_does_not() -> None:
    model = classifier().eval()
    first, last = model[0], model[3]
    groups = [{"params": [first.weight], "lr": 1e-3}, {"params": [last.weight], "lr": 4e-3}]
    optimizer = torch.optim.Adam(groups)
    direction = TargetDirection(model, class_losses, [batch(8, 9)], preconditioner=optimizer)
    direction.refresh()
    torch.testing.assert_close(list(direction.vectors.values()), mean_gradient(model, *batch(8, 9)))  # no step yet
    class_losses(model, batch(6)).mean().backward()
    optimizer.step()
    direction.refresh()
    assert set(direction.vectors) == {first.weight, last.weight}
    gradients = mean_gradient(model, *batch(8, 9))
    for parameter, gradient, rate in ((first.weight, gradients[0], 0.25), (last.weight, gradients[2], 1.0)):
        expected = rate * gradient / (parameter.grad.abs() + 1e-8)
        torch.testing.assert_close(direction.vectors[parameter], expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_batches": iter([1])}, "target_batches = list_iterator: can be read once only; give a list"),
        ({"guard_batches": (b for b in [1])}, "guard_batches = generator: can be read once only"),
        ({"refresh_every": 0}, "refresh_every = 0: must be at least 1"),
        ({"batches_per_refresh": -1}, "batches_per_refresh = -1: must be at least 1"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DirectionError, match=message):
        TargetDirection(classifier(), class_losses, **{"target_batches": [batch(2)], **arguments})


def test_what_cannot_be_differentiated_is_named() -> None:
    model = classifier()
    with pytest.raises(DirectionError, match="target_batches: must hold at least one example"):
        TargetDirection(model, class_losses, []).refresh()
    with pytest.raises(
        DirectionError, match=r"losses of shape \(\): must be one loss per example; use reduction='none'"
    ):
        TargetDirection(model, lambda m, b: class_losses(m, b).mean(), [batch(2)]).refresh()
    with pytest.raises(DirectionError, match="model: has no trainable parameter"):
        TargetDirection(classifier().requires_grad_(False), class_losses, [batch(2)]).refresh()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    message = "preconditioner = SGD: must be an Adam optimizer; its groups have no betas"
    with pytest.raises(DirectionError, match=message):
        TargetDirection(model, class_losses, [batch(2)], preconditioner=optimizer)


def test_momentum_keeps_a_share_of_the_directions_before_and_comes_back_from_a_checkpoint() -> None:
    def make(model: nn.Module) -> TargetDirection:
        return TargetDirection(model, class_losses, [batch(4, 1), batch(4, 2)], batches_per_refresh=1, momentum=0.6)

    model = classifier()
    direction = make(model)
    expected: list[Tensor] = []
    for turn in range(4):
        if turn == 2:
            state, direction = direction.state_dict(), make(model)
            direction.load_state_dict(state)
        direction.refresh()
        fresh = mean_gradient(model, *batch(4, 1 + turn % 2))
        expected = [0.6 * old + 0.4 * new for old, new in zip(expected, fresh, strict=True)] if expected else fresh
        torch.testing.assert_close(list(direction.vectors.values()), expected)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)


@pytest.mark.parametrize("momentum", [-0.1, 1.0])
def test_momentum_outside_its_range_is_refused(momentum: float) -> None:
    with pytest.raises(DirectionError, match=r"momentum = .*: must be in \[0, 1\)"):
        TargetDirection(classifier(), class_losses, [batch(4)], momentum=momentum)
