"""Every module that hooks see through, alone and in float64: contributions and gradients to ten digits."""

from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

from equipoise.torch import GhostContributions, OnePassContributions, TargetDirection
from tests.client.torch.models import FORWARD_MODE, reference, relative_error

COUNT = 6

Build: TypeAlias = Callable[[], nn.Module]


def squares(model: nn.Module, x: Tensor) -> Tensor:
    """A loss that makes every output element matter in another way."""
    y = model(x).flatten(1)
    return ((y - torch.linspace(-1, 1, y.shape[1], dtype=y.dtype)) ** 2).mean(1)


class Scale(nn.Module):
    """A user's own module: a learnt scale, and a learnt exponent."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.power = nn.Parameter(torch.rand(5)), nn.Parameter(torch.rand(1) + 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x.abs() ** self.power


class Flattened(nn.Module):
    """All tokens of all examples in one dimension, as some models do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.norm(x.flatten(0, 1)))
        return y.unflatten(0, x.shape[:2])


class Positions(nn.Module):
    """Positions that are looked up once for all examples."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.table, self.dimensions = nn.Embedding(9, 5), dimensions

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1])
        return x * self.table(positions if self.dimensions == 1 else positions[None])


class Tied(nn.Module):
    """One weight as table and as head, with a padding token whose row the table does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 5, padding_idx=2), nn.Linear(5, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.table(x).tanh())
        return y


class Twice(nn.Module):
    """One module that is called twice, by position and by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(input=self.linear(x).relu())
        return y


def vectors(*shape: int) -> Tensor:
    return torch.randn(COUNT, *shape, dtype=torch.float64)


def indices(*shape: int) -> Tensor:
    return torch.randint(7, (COUNT, *shape))


CASES: dict[str, tuple[Build, Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(5, 4), lambda: vectors(5)),
    "linear, tokens, wide": (lambda: nn.Linear(3, 8), lambda: vectors(4, 3)),
    "linear, no bias": (lambda: nn.Linear(5, 4, bias=False), lambda: vectors(2, 3, 5)),
    "Conv1D": (lambda: Conv1D(4, 5), lambda: vectors(3, 5)),
    "Conv1D, wide": (lambda: Conv1D(9, 5), lambda: vectors(3, 5)),
    "embedding": (lambda: nn.Embedding(7, 5), lambda: indices(4)),
    "embedding, one index": (lambda: nn.Embedding(7, 5), lambda: torch.tensor([3, 1, 4, 1, 5, 6])),
    "embedding, padding": (lambda: nn.Embedding(7, 5, padding_idx=3), lambda: indices(9)),
    "embedding, sparse": (lambda: nn.Embedding(7, 5, sparse=True), lambda: indices(4)),
    "LayerNorm": (lambda: nn.LayerNorm(5), lambda: vectors(4, 5)),
    "LayerNorm, 2d, no bias": (lambda: nn.LayerNorm((4, 5), bias=False), lambda: vectors(3, 4, 5)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), lambda: vectors(4, 3, 2)),
    "RMSNorm": (lambda: nn.RMSNorm(5), lambda: vectors(4, 5)),
    "LlamaRMSNorm": (lambda: LlamaRMSNorm(5), lambda: vectors(4, 5)),
    "T5LayerNorm": (lambda: T5LayerNorm(5), lambda: vectors(4, 5)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding="valid", groups=2), lambda: vectors(4, 9)),
    "Conv2d": (lambda: nn.Conv2d(3, 4, 3, padding="same", padding_mode="circular"), lambda: vectors(3, 5, 6)),
    "Conv2d, no bias": (lambda: nn.Conv2d(3, 4, (1, 2), dilation=2, bias=False), lambda: vectors(3, 5, 6)),
    "Conv3d": (lambda: nn.Conv3d(2, 2, 2), lambda: vectors(2, 3, 3, 3)),
    "ReLU in place": (lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace=True)), lambda: vectors(5)),
    "tokens, ReLU in place": (lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace=True)), lambda: vectors(3, 5)),
    "Conv2d, ReLU in place": (lambda: nn.Sequential(nn.Conv2d(3, 4, 2), nn.ReLU(True)), lambda: vectors(3, 5, 5)),
    "Conv1D, ReLU in place": (lambda: nn.Sequential(Conv1D(4, 5), nn.ReLU(inplace=True)), lambda: vectors(5)),
    "tokens in one dimension": (Flattened, lambda: vectors(3, 5)),
    "positions": (lambda: Positions(1), lambda: vectors(9, 5)),
    "positions of a batch of one": (lambda: Positions(2), lambda: vectors(COUNT, 5)),
    "tied weights": (Tied, lambda: indices(5)),
    "called twice": (Twice, lambda: vectors(5)),
    "frozen weight": (lambda: freeze(nn.Linear(5, 4), "weight"), lambda: vectors(5)),
    "frozen bias": (lambda: freeze(nn.LayerNorm(5), "bias"), lambda: vectors(5)),
    "frozen scale": (lambda: freeze(nn.LayerNorm(5), "weight"), lambda: vectors(5)),
    "frozen start": (lambda: nn.Sequential(nn.Linear(5, 4).requires_grad_(False), nn.Linear(4, 3)), lambda: vectors(5)),
}

EVERY = pytest.mark.parametrize("case", CASES)


def freeze(module: nn.Module, name: str) -> nn.Module:
    module.get_parameter(name).requires_grad_(False)
    return module


def prepare(case: str) -> tuple[nn.Module, Tensor, TargetDirection]:
    torch.manual_seed(0)
    build, batch = CASES[case]
    model = build().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x, target = batch(), batch()
    return model, x, TargetDirection(model, squares, [target])


@EVERY
def test_ghost(case: str) -> None:
    model, x, direction = prepare(case)
    with GhostContributions(model, direction).capture(range(COUNT)) as capture:
        losses = capture.losses(x)
        (losses * torch.rand(COUNT)).sum().backward()
    assert relative_error(capture.contributions, reference(model, direction, x)) < 1e-10


@EVERY
def test_one_pass(case: str) -> None:
    model, x, direction = prepare(case)
    weights = torch.rand(COUNT, dtype=torch.float64)
    with OnePassContributions(model, direction).capture(range(COUNT)) as capture:
        capture.losses(x)
        assert relative_error(capture.contributions, reference(model, direction, x)) < 1e-10
        capture.backward(weights)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad((weights * squares(model, x)).mean(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient.to_dense(), rtol=1e-10, atol=1e-14)


@FORWARD_MODE
@pytest.mark.parametrize("method", [GhostContributions, OnePassContributions])
def test_modules_of_the_user_by_forward_mode(method: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), Scale()).double()
    direction = TargetDirection(model, squares, [vectors(5)])
    x = vectors(5)
    with method(model, direction, also=(Scale,)).capture(range(COUNT)) as capture:
        losses = capture.losses(x)
        if method is GhostContributions:
            losses.mean().backward()
        else:
            capture.backward(torch.ones(COUNT))
    assert relative_error(capture.contributions, reference(model, direction, x)) < 1e-10
    expected = torch.autograd.grad(squares(model, x).mean(), list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-14)


def test_a_small_direction_does_not_drown_in_a_norm_around_one() -> None:
    """GemmaRMSNorm scales by 1 + w, in float32: a direction of 1e-8 is below the rounding of 1."""
    torch.manual_seed(0)
    model, x = GemmaRMSNorm(5), torch.randn(COUNT, 4, 5)
    direction = TargetDirection(model, lambda m, b: 1e-8 * squares(m, b), [torch.randn(COUNT, 4, 5)])
    with GhostContributions(model, direction).capture(range(COUNT)) as capture:
        capture.losses(x).mean().backward()
    assert 0 < max(vector.abs().max() for vector in direction.vectors.values()) < 1e-7
    assert relative_error(capture.contributions, reference(model, direction, x)) < 1e-5
