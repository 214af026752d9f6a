"""∂J/∂γ by the adjoint against autograd through whole training runs, float64."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from equipoise_trainer.offline.adjoint import pull_back
from equipoise_trainer.offline.logistic import LogisticProblem
from equipoise_trainer.offline.module import Apply, ModuleData, ModuleProblem
from equipoise_trainer.offline.path import RunPath
from equipoise_trainer.perturbation import PADDING
from equipoise_trainer.reproduction.transformer import PaperTransformer
from equipoise_trainer.reproduction.transformer import sequence_losses as padded_losses
from equipoise_trainer.tasks import Examples, Task

STEPS, ETA = 20, 0.5


class Attention(nn.Module):
    """One causal block with everything that makes second derivatives interesting; fused attention, as users have it."""

    def __init__(self, vocabulary: int = 11, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.mixing = nn.Linear(width, 3 * width)
        self.feed = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        query, key, value = self.mixing(hidden).chunk(3, dim=-1)
        hidden = hidden + nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        logits: Tensor = self.head(hidden + self.feed(hidden))
        return logits


def paper_transformer() -> PaperTransformer:
    return PaperTransformer(vocabulary=11, length=6, width=8, layers=2, heads=2)


def plain_losses(apply: Apply, tokens: Tensor) -> Tensor:
    logits = apply(tokens[:, :-1])
    return nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(dim=1)


def draw_weights(rows: int, size: int) -> NDArray[np.float32]:
    """Rows with mean 1 and some exact zeros."""
    rng = np.random.default_rng(5)
    weights = rng.exponential(size=(rows, size)) * (rng.random((rows, size)) > 0.2)
    return (weights / weights.mean(axis=1, keepdims=True)).astype(np.float32)


def unrolled(
    start: Tensor, train: Callable[[Tensor], Tensor], target: Callable[[Tensor], Tensor], weights: NDArray[np.float32]
) -> NDArray[np.float64]:
    """∂J/∂γ by autograd through every step, [T, N]."""
    gamma = (torch.from_numpy(weights).double() / weights.shape[1]).requires_grad_()
    theta, objective = start.clone().requires_grad_(), torch.zeros(())
    for step in range(len(weights)):
        (gradient,) = torch.autograd.grad(train(theta) @ gamma[step], theta, create_graph=True)
        theta = theta - ETA * gradient
        objective = objective + target(theta).mean()
    return torch.autograd.grad(objective, gamma)[0].numpy()


def by_adjoint(path: RunPath[NDArray[np.floating]] | RunPath[Tensor]) -> NDArray[np.float64]:
    found = np.zeros(path.weights.shape)
    for step, contributions in pull_back(path):  # type: ignore[misc,arg-type]
        found[step] = -ETA * contributions
    return found


def assert_equal_to_1e_8(found: NDArray[np.float64], expected: NDArray[np.float64]) -> None:
    assert np.linalg.norm(found - expected) < 1e-8 * np.linalg.norm(expected)
    rows = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert rows.max() < 1e-8


@pytest.mark.parametrize("memory_bytes", [1 << 30, 0], ids=["all kept", "checkpoints"])
def test_perceptron(memory_bytes: int) -> None:
    rng = np.random.default_rng(0)

    def draw(size: int) -> Examples:
        return Examples(features=rng.standard_normal((size, 6)), labels=rng.integers(0, 2, size))

    train, target = draw(30), draw(12)
    task = Task(
        name="t",
        seed=0,
        classes=2,
        train=train,
        target=target,
        guard=target,
        test=target,
        flipped=np.zeros(30, np.bool_),
    )
    problem = LogisticProblem(task, learning_rate=ETA, dtype=np.float64)
    weights = draw_weights(STEPS, 30)

    def losses(examples: Examples) -> Callable[[Tensor], Tensor]:
        features, labels = torch.from_numpy(examples.features), torch.from_numpy(examples.labels).double()
        return lambda theta: nn.functional.binary_cross_entropy_with_logits(features @ theta, labels, reduction="none")

    expected = unrolled(torch.zeros(6).double(), losses(train), losses(target), weights)
    assert_equal_to_1e_8(by_adjoint(RunPath.run(problem, weights, memory_bytes=memory_bytes)), expected)


@pytest.mark.parametrize(
    ("kind", "sequence_losses", "memory_bytes"),
    [(Attention, plain_losses, 1 << 30), (Attention, plain_losses, 0), (paper_transformer, padded_losses, 1 << 30)],
    ids=["fused attention, all kept", "fused attention, checkpoints", "the paper's"],
)
def test_transformer(
    kind: Callable[[], nn.Module], sequence_losses: Callable[[Apply, Tensor], Tensor], memory_bytes: int
) -> None:
    torch.manual_seed(1)
    module = kind().double()
    train, target = torch.randint(11, (10, 6)), torch.randint(11, (5, 6))
    if sequence_losses is padded_losses:
        train[3, 4:] = PADDING
    problem = ModuleProblem(
        module,
        sequence_losses,
        ModuleData(train=train, target=target, test=target),
        learning_rate=ETA,
        reference_nats=math.log(11),
        chunk=4,  # leaves a smaller last part
    )
    weights = draw_weights(STEPS, 10)
    names = [name for name, _ in module.named_parameters()]
    shapes = [parameter.shape for parameter in module.parameters()]

    def losses(tokens: Tensor) -> Callable[[Tensor], Tensor]:
        def of(theta: Tensor) -> Tensor:
            pieces = theta.split([shape.numel() for shape in shapes])
            parameters = {name: piece.view(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}
            return sequence_losses(lambda inputs: torch.func.functional_call(module, parameters, (inputs,)), tokens)

        return of

    start = nn.utils.parameters_to_vector(module.parameters()).detach()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = unrolled(start, losses(train), losses(target), weights)
    assert_equal_to_1e_8(by_adjoint(RunPath.run(problem, weights, memory_bytes=memory_bytes)), expected)
