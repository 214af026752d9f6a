"""Losses, gradients and contributions in closed form against torch autograd, float64."""

import numpy as np
import pytest
import torch

from equipoise_trainer import perceptron
from equipoise_trainer.tasks import Examples


def draw(size: int, *, classes: int, seed: int, scale: float = 1.0) -> Examples:
    rng = np.random.default_rng(seed)
    return Examples(features=scale * rng.standard_normal((size, 7)), labels=rng.integers(0, classes, size))


def autograd_losses(theta: torch.Tensor, examples: Examples) -> torch.Tensor:
    logits = torch.from_numpy(examples.features) @ theta
    labels = torch.from_numpy(examples.labels)
    if theta.shape[1] == 1:
        return torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0], labels.double(), reduction="none")
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_gradients_and_contributions_are_those_of_autograd(classes: int) -> None:
    train, target = draw(40, classes=classes, seed=1), draw(15, classes=classes, seed=2)
    theta = 0.5 * np.random.default_rng(3).standard_normal((7, 1 if classes == 2 else classes))
    weights = np.random.default_rng(4).exponential(size=40)
    now, at_target = perceptron.forward(theta, train), perceptron.forward(theta, target)
    direction = perceptron.gradient(target, at_target.residuals)
    found = perceptron.contributions(train, now.residuals, direction)

    leaf = torch.from_numpy(theta).requires_grad_()
    losses = autograd_losses(leaf, train)
    (weighted,) = torch.autograd.grad((torch.from_numpy(weights) * losses).mean(), leaf, retain_graph=True)
    (wanted,) = torch.autograd.grad(autograd_losses(leaf, target).mean(), leaf)
    each = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in losses]

    np.testing.assert_allclose(now.losses, losses.detach().numpy(), rtol=1e-12)
    np.testing.assert_allclose(perceptron.gradient(train, now.residuals, weights), weighted.numpy(), rtol=1e-11)
    np.testing.assert_allclose(direction, wanted.numpy(), rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(found, [float((wanted * one).sum()) for one in each], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("classes", [2, 4])
def test_huge_logits_stay_finite_and_right(classes: int) -> None:
    examples = draw(30, classes=classes, seed=5, scale=1e4)
    theta = np.random.default_rng(6).standard_normal((7, 1 if classes == 2 else classes))
    now = perceptron.forward(theta, examples)
    assert np.isfinite(now.losses).all()
    assert np.isfinite(now.residuals).all()
    np.testing.assert_allclose(now.losses, autograd_losses(torch.from_numpy(theta), examples).numpy(), rtol=1e-12)


@pytest.mark.parametrize(("classes", "columns"), [(2, 1), (10, 10)])
def test_the_start_is_the_uniform_guess(classes: int, columns: int) -> None:
    theta = perceptron.initial_parameters(7, classes)
    assert theta.shape == (7, columns)
    assert perceptron.mean_loss(theta, draw(9, classes=classes, seed=0)) == pytest.approx(np.log(classes), rel=1e-12)


def test_accuracy_counts_the_likeliest_class() -> None:
    examples = Examples(features=np.array([[1.0], [-1.0], [2.0], [-3.0]]), labels=np.array([1, 0, 0, 0]))
    assert perceptron.accuracy(np.array([[1.0]]), examples) == 0.75
    assert perceptron.accuracy(np.array([[-1.0, 1.0, 0.0]]), examples) == 0.75
