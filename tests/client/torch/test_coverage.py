"""Contributions are right whatever the model does, or it is refused and what the message says to paste is right."""

import re
from typing import Any

import pytest
import torch
from torch import nn

from equipoise.torch import (
    GhostContributions,
    JvpContributions,
    OnePassContributions,
    TargetDirection,
    UnsupportedModuleError,
)
from equipoise.torch.quiet import ModelState
from tests.client.torch.models import reference, relative_error
from tests.client.torch.zoo import CASES, TABLE, WHOLE, Case, mlp, shaken, squares, table, vectors

EVERY = pytest.mark.parametrize("name", CASES)

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]


def prepared(case: Case) -> tuple[nn.Module, Any, TargetDirection, torch.Tensor]:
    torch.manual_seed(0)
    model = shaken(case.build())
    direction = TargetDirection(model, case.losses, [case.batch()])
    return model, case.batch(), direction, torch.rand(case.count, dtype=torch.float64) + 0.5


def expected(model: nn.Module, direction: TargetDirection, batch: Any) -> torch.Tensor:
    """By the definition; what a forward pass changes is as it was."""
    before = ModelState(model)
    result = reference(model, direction, batch)
    before.restore()
    return result


@EVERY
def test_hooks(name: str) -> None:
    """Two steps: the one that is surveyed, and one like all others."""
    case = CASES[name]
    model, batch, direction, weights = prepared(case)
    contributions = GhostContributions(model, direction, **case.options)
    direction.refresh()
    for _ in range(2):
        right = expected(model, direction, batch)
        with contributions.capture(range(case.count)) as capture:
            if case.refused:
                with pytest.raises(UnsupportedModuleError, match=case.refused) as caught:
                    capture.losses(batch)
                assert pasted(str(caught.value), model, direction, batch, right) < 1e-6
                return
            (capture.losses(batch) * weights).mean().backward()
        assert relative_error(capture.contributions, right) < 1e-6
    assert contributions.coverage.plan is not None
    assert bool(contributions.coverage.plan.blocks) == (case.how == WHOLE)  # as the table says


@EVERY
def test_one_pass(name: str) -> None:
    case = CASES[name]
    model, batch, direction, weights = prepared(case)
    direction.refresh()
    contributions = OnePassContributions(model, direction, **case.options)
    for _ in range(2):
        right = expected(model, direction, batch)
        state = ModelState(model)
        with contributions.capture(range(case.count)) as capture:
            if case.refused:
                with pytest.raises(UnsupportedModuleError, match=case.refused):
                    capture.losses(batch)
                return
            capture.losses(batch)
            assert relative_error(capture.contributions, right) < 1e-6
            model.zero_grad()
            capture.backward(weights)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        after = ModelState(model)
        state.restore()
        gradients = torch.autograd.grad((case.losses(model, batch) * weights).mean(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                torch.testing.assert_close(parameter.grad, gradient.to_dense(), rtol=1e-9, atol=1e-12)
        after.restore()


def pasted(message: str, model: nn.Module, direction: TargetDirection, batch: Any, right: torch.Tensor) -> float:
    """The error of the method that a message names."""
    found = re.search(r"use (\w+\(model, direction\))", message)
    assert found is not None
    method = eval(found[1], {"JvpContributions": JvpContributions, "model": model, "direction": direction})
    with method.capture(range(len(right))) as capture:
        capture.losses(batch).mean().backward()
    return relative_error(capture.contributions, right)


@pytest.mark.parametrize("name", ["MultiheadAttention", "GroupNorm, SiLU in place", "routed experts", "T = B"])
def test_an_optimizer_may_step_within_the_block(name: str) -> None:
    """Contributions are those at the parameters of the forward pass."""
    case = CASES["positions, T = B" if name == "T = B" else name]
    model, batch, direction, _ = prepared(case)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    contributions = GhostContributions(model, direction)
    direction.refresh()
    for _ in range(2):
        right = expected(model, direction, batch)
        with contributions.capture(range(case.count)) as capture:
            capture.losses(batch).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert relative_error(capture.contributions, right) < 1e-6


@pytest.mark.parametrize("method", [GhostContributions, JvpContributions])
def test_forward_mode_under_autocast_goes_through_normalisations(method: Any) -> None:
    """There torch gives the derivative of a normalisation in another precision than its output."""
    case = CASES["learnt positions: scaled"]
    model, batch, _, _ = prepared(case)
    model.float()
    direction = TargetDirection(model, case.losses, [batch])
    direction.refresh()
    right = expected(model, direction, batch)
    with method(model, direction).capture(range(case.count)) as capture, torch.autocast("cpu", torch.bfloat16):
        losses = capture.losses(batch)
        losses.mean().backward()
    assert relative_error(capture.contributions, right) < 2e-2


@pytest.mark.filterwarnings("ignore")  # the compiler itself warns
def test_a_function_that_is_compiled_is_refused() -> None:
    """A block of which `forward` alone is compiled runs hooks of none of its modules."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 3)).double()
    model[1].forward = torch.compile(model[1].forward, backend="aot_eager")
    x = torch.randn(6, 5).double()
    direction = TargetDirection(model, squares, [x])
    with (
        GhostContributions(model, direction).capture(range(6)) as capture,
        pytest.raises(UnsupportedModuleError, match=r"a part of it is compiled and runs no hooks; use Jvp") as caught,
    ):
        capture.losses(x)
    assert pasted(str(caught.value), model, direction, x, reference(model, direction, x)) < 1e-6


def test_the_table_is_that_of_the_cases() -> None:
    assert TABLE.read_text() == table(), "python -m tests.client.torch.zoo"


class Task(nn.Module):
    """A model, and the computation of its losses, in one call: as frameworks wrap a training step."""

    def __init__(self) -> None:
        super().__init__()
        self.model = mlp()

    def forward(self, step: Any) -> Any:
        return step(self.model)


def test_losses_may_be_known_before_a_call_around_them_ends() -> None:
    torch.manual_seed(0)
    task, batch = shaken(Task()), vectors(5)()
    direction = TargetDirection(task, lambda task, x: squares(task.model, x), [vectors(5)()])
    contributions = GhostContributions(task, direction)
    for _ in range(2):
        with contributions.capture(range(len(batch))) as capture:
            task(lambda model: capture.watch(squares(model, batch))).mean().backward()
        assert relative_error(capture.contributions, reference(task, direction, batch)) < 1e-6
