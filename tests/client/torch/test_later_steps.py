"""Contributions stay right when a later step is not like the one that was surveyed; else nothing is known of it."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from equipoise.torch import GhostContributions, OnePassContributions, TargetDirection
from equipoise.torch.direction import ExampleLoss
from equipoise.torch.quiet import ModelState
from tests.client.torch.models import reference, relative_error
from tests.client.torch.zoo import mlp, shaken, squares


def unknown_steps(
    build: Callable[[], nn.Module],
    batches: Iterable[Tensor],
    *,
    losses_of: ExampleLoss = squares,
    before: Callable[[Any, int], None] = lambda _model, _number: None,
    refresh_every: int = 1000,
    method: Any = GhostContributions,
) -> list[int]:
    """Compares each step's contributions with their definition; returns the steps of which nothing is known."""
    torch.manual_seed(0)
    model, batches = shaken(build()), list(batches)
    direction = TargetDirection(model, losses_of, [batches[0]], refresh_every=refresh_every)
    contributions = method(model, direction)
    unknown = []
    for number, batch in enumerate(batches):
        before(model, number)
        state = ModelState(model)
        with contributions.capture(range(len(batch))) as capture:
            losses = capture.losses(batch)
            model.zero_grad()
            capture.backward(np.ones(len(batch))) if method is OnePassContributions else losses.mean().backward()
        found, gradients = capture.contributions, [parameter.grad for parameter in model.parameters()]
        state.restore()
        if bool(found.isfinite().all()):
            assert relative_error(found, reference(model, direction, batch)) < 1e-6, f"step {number}"
        else:
            unknown.append(number)
        expected = torch.autograd.grad(losses_of(model, batch).mean(), list(model.parameters()), allow_unused=True)
        torch.testing.assert_close(gradients, list(expected), rtol=1e-9, atol=1e-12)
    return unknown


def rows(*shape: int, steps: int = 8) -> list[Tensor]:
    drawn = torch.Generator().manual_seed(3)
    return [torch.randn(*shape, generator=drawn, dtype=torch.float64) for _ in range(steps)]


class Tasks(nn.Module):
    """A head for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.heads, self.task = nn.Linear(5, 6), nn.ModuleList(nn.Linear(6, 3) for _ in range(3)), 0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.heads[self.task](torch.tanh(self.trunk(x)))
        return y


def turn(model: Tasks, number: int) -> None:
    model.task = number % 3


@pytest.mark.parametrize("shape", [(6, 5), (6, 4, 5)])
def test_tasks_in_turn_are_all_scored_soon(shape: tuple[int, ...]) -> None:
    """A module that is called later than in the first step is noticed, and looked at the next time it is."""
    assert unknown_steps(Tasks, rows(*shape, steps=12), before=turn, refresh_every=5) == [1]


class Bare(Tasks):
    """A parameter of no module of its own for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ParameterList(torch.randn(6, 3) for _ in range(3))  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.trunk(x)) @ self.heads[self.task]  # type: ignore[operator]


class PerTask(nn.Module):
    """Modules without a formula, one for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.gates, self.task = nn.Linear(5, 6), nn.ModuleList(nn.PReLU(6) for _ in range(3)), 0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.gates[self.task](self.trunk(x))
        return y


@pytest.mark.parametrize("build", [Bare, PerTask])
@pytest.mark.parametrize("method", [GhostContributions, OnePassContributions])
def test_parameters_without_a_formula_may_be_used_later(build: Callable[[], nn.Module], method: Any) -> None:
    """One pass gives them their gradients, too."""
    unknown = unknown_steps(build, rows(6, 5, steps=9), before=turn, method=method)
    assert unknown in ([], [1])


class Routed(nn.Module):
    """Whole examples, or single tokens, go to one of two experts."""

    def __init__(self, *, tokens: bool) -> None:
        super().__init__()
        self.experts, self.head = nn.ModuleList(nn.Linear(5, 5) for _ in range(2)), nn.Linear(5, 2)
        self.tokens = tokens

    def forward(self, x: Tensor) -> Tensor:
        items = x.flatten(0, 1) if self.tokens else x
        expert, y = items.flatten(1).sum(1) > 0, torch.zeros_like(items)
        for number, module in enumerate(self.experts):
            chosen = (expert == bool(number)).nonzero()[:, 0]
            if len(chosen):
                y = y.index_add(0, chosen, module(items[chosen]))
        out: Tensor = self.head(y.view(x.shape)).mean(1)
        return out


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("length", [2, 4])
def test_experts_may_get_other_rows_in_each_step(count: int, tokens: bool, length: int) -> None:
    """Rows that happen to be those of the examples in the first step are others later."""
    for start in range(4):  # with another batch as the first
        batches = rows(count, length, 5, steps=24)[start:]
        assert len(unknown_steps(lambda: Routed(tokens=tokens), batches)) <= 2


class Sorted(nn.Module):
    """Examples by length, as packed sequences want them, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        order = x.sum((1, 2)).argsort()
        y: Tensor = self.b(torch.tanh(self.a(x[order])))
        return y[order.argsort()].mean(1)


def sorted_by_losses(model: Any, x: Tensor) -> Tensor:
    order = x.sum((1, 2)).argsort()
    return squares(model, x[order])[order.argsort()]


def in_order(steps: int) -> list[Tensor]:
    """Batches of which the first is sorted already."""
    first, *rest = rows(4, 3, 5, steps=steps)
    return [first[first.sum((1, 2)).argsort()], *rest]


def test_rows_may_be_sorted_within_the_model() -> None:
    assert unknown_steps(Sorted, in_order(8)) == []


def test_rows_may_be_sorted_by_the_losses() -> None:
    assert unknown_steps(mlp, in_order(8), losses_of=sorted_by_losses) == [1]


@pytest.mark.parametrize("count", [2, 4, 6, 8])
def test_rows_may_be_exchanged_by_pairs(count: int) -> None:
    """Always noticed, not only where the halves of a survey happen to part a pair."""

    class Mixup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(self.a(x))
            out: Tensor = self.b(0.7 * y + 0.3 * y.flip(0))
            return out

    for _ in range(8):
        assert unknown_steps(Mixup, rows(count, 5, steps=2)) == []
        reverse = unknown_steps(mlp, rows(count, 5, steps=2), losses_of=lambda m, x: squares(m, x.flip(0)).flip(0))
        assert reverse == []


def test_batch_normalisation_that_begins_to_mix_is_refused() -> None:
    """As where the norms are frozen for the first steps."""

    def thaw(model: nn.Module, number: int) -> None:
        model.train(number > 1)

    with pytest.raises(Exception, match=r"1 \(BatchNorm1d\): batch normalisation in training mode mixes examples"):
        unknown_steps(
            lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), rows(6, 5), before=thaw
        )


class Pair(nn.Module):
    """Two outputs, made by parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.tanh(x @ self.a)
        return first, torch.tanh(x @ self.b) * first


class Either(nn.Module):
    """Uses the second output now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.pair, self.head, self.both = Pair(), nn.Linear(4, 3), False

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.pair(x)
        y: Tensor = self.head(first + second if self.both else first)
        return y


def test_an_output_that_enters_the_losses_later_is_seen() -> None:
    def both(model: Either, number: int) -> None:
        model.both = number % 3 == 2

    assert unknown_steps(Either, rows(6, 5, steps=12), before=both) == [2]


def test_what_becomes_trainable_counts_at_once() -> None:
    """The direction is of the parameters that are trained, not of those that were at its last refresh."""
    torch.manual_seed(0)
    model, x = shaken(mlp()), rows(6, 5)[0]
    model[0].requires_grad_(False)
    direction = TargetDirection(model, squares, [x], refresh_every=1000)
    contributions = GhostContributions(model, direction)
    for trained in (False, True):
        model[0].requires_grad_(trained)
        with contributions.capture(range(6)) as capture:
            capture.losses(x).mean().backward()
        assert set(direction.vectors) == {p for p in model.parameters() if p.requires_grad}
        assert relative_error(capture.contributions, reference(model, direction, x)) < 1e-6


def test_modules_may_be_exchanged() -> None:
    """A new head has its part in the very next step."""
    torch.manual_seed(0)
    model, x = shaken(mlp()), rows(6, 5)[0]
    direction = TargetDirection(model, squares, [x], refresh_every=1000)
    contributions = GhostContributions(model, direction)
    for _ in range(2):
        with contributions.capture(range(6)) as capture:
            capture.losses(x).mean().backward()
        assert set(direction.vectors) == set(model.parameters())
        assert relative_error(capture.contributions, reference(model, direction, x)) < 1e-6
        model[2] = nn.Linear(4, 3).double()
    assert math.isfinite(float(direction.norm))
