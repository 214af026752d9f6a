"""Contributions of real language models equal those of per-example gradients in float64."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from equipoise.torch import (
    FiniteDifferenceContributions,
    GhostContributions,
    JvpContributions,
    LastLayerContributions,
    OnePassContributions,
    TargetDirection,
    weighted_mean,
)
from tests.client.torch.models import FORWARD_MODE, gpt2, llama, lm_losses, reference, relative_error, tokens

COUNT = 24
WEIGHTS = torch.linspace(0.25, 2.0, COUNT)

MODELS = pytest.mark.parametrize("build", [gpt2, llama])


def exact(model: nn.Module, batch: Any) -> Tensor:
    """The definition, in float64 at the same parameters."""
    precise = copy.deepcopy(model).double()
    direction = target(precise)
    direction.refresh()
    return reference(precise, direction, batch)


def target(model: nn.Module) -> TargetDirection:
    return TargetDirection(model, lm_losses, [tokens(8, seed=1), tokens(5, seed=2, padded=True)])


def trained_gradients(model: nn.Module, batch: Any, weights: Tensor) -> list[Tensor]:
    """Gradients of a plain weighted step."""
    gradients = torch.autograd.grad(weighted_mean(lm_losses(model, batch), weights), list(model.parameters()))
    return list(gradients)


@MODELS
@pytest.mark.parametrize("padded", [False, True])
def test_ghost_is_exact_under_weights_and_leaves_the_gradients_alone(
    build: Callable[[], nn.Module], padded: bool
) -> None:
    model, batch = build(), tokens(COUNT, padded=padded)
    expected, gradients = exact(model, batch), trained_gradients(model, batch, WEIGHTS)
    contributions = GhostContributions(model, target(model))
    with contributions.capture(range(COUNT)) as capture:
        losses = capture.losses(batch)
        weighted_mean(losses, WEIGHTS).backward()
    assert relative_error(capture.contributions, expected) < 1e-4
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7)


@MODELS
@FORWARD_MODE
def test_jvp_is_exact(build: Callable[[], nn.Module]) -> None:
    model, batch = build(), tokens(COUNT, padded=True)
    with JvpContributions(model, target(model)).capture(range(COUNT)) as capture:
        capture.losses(batch)
    assert relative_error(capture.contributions, exact(model, batch)) < 1e-4


@MODELS
def test_one_pass_is_exact_and_gives_the_gradient_of_the_weighted_loss(build: Callable[[], nn.Module]) -> None:
    model, batch = build(), tokens(COUNT, padded=True)
    expected, gradients = exact(model, batch), trained_gradients(model, batch, WEIGHTS)
    with OnePassContributions(model, target(model)).capture(range(COUNT)) as capture:
        capture.losses(batch)
        assert relative_error(capture.contributions, expected) < 1e-4
        capture.backward(WEIGHTS)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        assert relative_error(parameter.grad, gradient.double()) < 1e-5


@MODELS
def test_finite_differences_rank_examples_as_exactly(build: Callable[[], nn.Module]) -> None:
    model, batch = build(), tokens(64, padded=True)
    expected = exact(model, batch)
    with FiniteDifferenceContributions(model, target(model)).capture(range(64)) as capture:
        losses = capture.losses(batch)
        weighted_mean(losses, torch.ones(64)).backward()
    assert spearmanr(capture.contributions, expected).statistic > 0.999
    assert relative_error(capture.contributions, expected) < 0.02


@MODELS
def test_the_last_layer_gives_its_own_share(build: Callable[[], nn.Module]) -> None:
    """With all other parameters frozen it is exact; the head of GPT-2 is tied, so its embedding must be untied."""
    model, batch = build(), tokens(COUNT)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "lm_head.weight")
    expected = exact(model, batch)
    model.requires_grad_(True)
    with LastLayerContributions(model, target(model)).capture(range(COUNT)) as capture:
        capture.losses(batch).mean().backward()
    assert relative_error(capture.contributions, expected) < 1e-4
