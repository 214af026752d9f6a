"""Any torch module as a problem of the search: per-example gradients are never formed.

For the weighted loss S(γ, θ) = Σγ_n·l_n(θ) and g = ∂S/∂θ, one backward pass through λ·g gives both derivatives that are
needed: ∂(λ·g)/∂γ_n = λ·∇l_n, and ∂(λ·g)/∂θ = H_γ·λ. It needs operations that can be differentiated twice, which fused
attention cannot.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from equipoise_trainer.offline.problem import Look, Split, Statistics
from equipoise_trainer.offline.rows import Weights

Apply: TypeAlias = Callable[..., Tensor]
"""The module with some parameters."""

Losses: TypeAlias = Callable[[Apply, Tensor], Tensor]
"""Losses [B], nats, of a module on examples [B, ...]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleData:
    """Examples of a problem, each set [n, ...], on the device of the module.

    Attributes:
        train: the N examples that are weighed.
        target: target A.
        test: unseen examples of the desired distribution.
    """

    train: Tensor
    target: Tensor
    test: Tensor


class ModuleProblem:
    """See the module. The module's own parameters are θ_0 and stay as they are; it must not be random.

    Args:
        module: the model.
        losses: its losses on examples.
        data: the examples.
        learning_rate: η.
        reference_nats: ln|V|.
        chunk: examples that are differentiated twice at once: what bounds the memory.
    """

    def __init__(
        self,
        module: nn.Module,
        losses: Losses,
        data: ModuleData,
        *,
        learning_rate: float,
        reference_nats: float,
        chunk: int = 256,
    ) -> None:
        self._module = module
        self._losses = losses
        self._data = data
        self._splits: dict[Split, Tensor] = {"target": data.target, "test": data.test}
        self._learning_rate = learning_rate
        self._reference_nats = reference_nats
        self._chunk = chunk
        self._shapes = {name: parameter.shape for name, parameter in module.named_parameters()}

    @property
    def num_examples(self) -> int:
        """N."""
        return len(self._data.train)

    @property
    def vector_bytes(self) -> int:
        """Memory of one vector of parameters."""
        return sum(each.numel() * each.element_size() for each in self._module.parameters())

    @property
    def reference_nats(self) -> float:
        """ln|V|."""
        return self._reference_nats

    def initial(self) -> Tensor:
        """θ_0, flat."""
        return torch.cat([each.detach().reshape(-1) for each in self._module.parameters()]).clone()

    def descend(self, parameters: Tensor, weights: Weights, *, norm: float | None = None) -> tuple[Tensor, float]:
        """See `Problem`."""
        gradient = self._gradient(parameters, self._data.train, self._row(weights, parameters))
        length = float(gradient.norm())
        if norm is not None and length > 0:
            gradient, length = gradient * (norm / length), norm
        return parameters - self._learning_rate * gradient, length

    def target_gradient(self, parameters: Tensor) -> Tensor:
        """See `Problem`."""
        return self._gradient(parameters, self._data.target, None)

    def replay(self, parameters: Sequence[Tensor], weights: Weights) -> "ModuleSegment":
        """See `Problem`."""
        return ModuleSegment(self, parameters, weights)

    def mean_losses(self, parameters: Sequence[Tensor], split: Split) -> NDArray[np.float64]:
        """See `Problem`."""
        return np.array([float(self.losses(each, self._splits[split]).mean()) for each in parameters])

    def losses(self, parameters: Tensor, examples: Tensor) -> Tensor:
        """Losses of examples, [n], without a graph."""
        with torch.no_grad():
            apply = self._apply(parameters)
            return torch.cat([self._losses(apply, part) for part in torch.split(examples, 4 * self._chunk)])

    def differentiate(self, parameters: Tensor, weights: Weights, vector: Tensor) -> tuple[Tensor, Tensor]:
        """vector·∇l_n for all training examples, [N], and H_γ·vector, [P]."""
        row = self._row(weights, parameters)
        contributions, curved = [], torch.zeros_like(parameters)
        for examples, part in zip(
            torch.split(self._data.train, self._chunk), torch.split(row, self._chunk), strict=True
        ):
            theta, gamma = parameters.detach().requires_grad_(), part.detach().requires_grad_()
            with _differentiable_twice():
                weighted = self._losses(self._apply(theta), examples) @ gamma
                (gradient,) = torch.autograd.grad(weighted, theta, create_graph=True)
                each, bent = torch.autograd.grad(gradient @ vector, (gamma, theta))
            contributions.append(each)
            curved += bent
        return torch.cat(contributions), curved / self.num_examples

    def step_back(self, parameters: Tensor, weights: Weights, adjoint: Tensor) -> tuple[Tensor, Tensor]:
        """λ_{t+1}·∇l_n and λ_t, see `Segment.pull`."""
        contributions, curved = self.differentiate(parameters, weights, adjoint)
        return contributions, self.target_gradient(parameters) + adjoint - self._learning_rate * curved

    def look(self, parameters: Tensor, weights: Weights) -> Look:
        """Losses and contributions of all training examples."""
        contributions, _ = self.differentiate(parameters, weights, self.target_gradient(parameters))
        return Look(
            losses=self.losses(parameters, self._data.train).cpu().numpy(), contributions=contributions.cpu().numpy()
        )

    def _gradient(self, parameters: Tensor, examples: Tensor, weights: Tensor | None) -> Tensor:
        """∇ mean_n(w_n·l_n), [P]."""
        theta = parameters.detach().requires_grad_()
        total = torch.zeros_like(parameters)
        for start in range(0, len(examples), self._chunk):
            losses = self._losses(self._apply(theta), examples[start : start + self._chunk])
            summed = losses.sum() if weights is None else losses @ weights[start : start + self._chunk]
            total += torch.autograd.grad(summed, theta)[0]
        return total / len(examples)

    def _apply(self, flat: Tensor) -> Apply:
        """The module with the parameters in a flat vector, which can be differentiated by it."""
        sizes = [shape.numel() for shape in self._shapes.values()]
        pieces = zip(self._shapes.items(), torch.split(flat, sizes), strict=True)
        parameters = {name: piece.view(shape) for (name, shape), piece in pieces}

        def apply(*inputs: Tensor) -> Tensor:
            outputs: Tensor = functional_call(self._module, parameters, inputs)
            return outputs

        return apply

    def _row(self, weights: Weights, like: Tensor) -> Tensor:
        return torch.from_numpy(np.array(weights)).to(like)


class ModuleSegment:
    """k steps of a module, see `equipoise_trainer.offline.problem.Segment`."""

    def __init__(self, problem: ModuleProblem, parameters: Sequence[Tensor], weights: Weights) -> None:
        self._problem = problem
        self._parameters = parameters
        self._weights = weights

    def pull(self, index: int, adjoint: Tensor) -> tuple[Statistics, Tensor]:
        """See `Segment`."""
        contributions, earlier = self._problem.step_back(self._parameters[index], self._weights[index], adjoint)
        return contributions.cpu().numpy(), earlier

    def look(self, index: int) -> Look:
        """See `Segment`."""
        return self._problem.look(self._parameters[index], self._weights[index])


@contextmanager
def _differentiable_twice() -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH):
        yield
