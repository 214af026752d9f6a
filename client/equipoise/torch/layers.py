"""How the parameters of one module enter its output: what `ghost` contracts and `one_pass` differentiates.

Let x be a module's input, g the gradient of the per-example losses with respect to its output and V a direction in the
space of its parameters. A layer gives per example `Σ_t ⟨∂y_t/∂θ·V, g_t⟩`, without any gradient of a parameter.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn

from equipoise.torch.rows import Rows, precise

Direction: TypeAlias = Mapping[nn.Parameter, Tensor]
"""A vector in the space of the parameters; a parameter that is missing has zero."""


@dataclass(frozen=True, slots=True, eq=False)
class Layer(ABC):
    """One module with parameters of its own.

    Attributes:
        path: its name in the model.
        module: the module.
    """

    path: str
    module: Any

    @abstractmethod
    def contract(self, x: Tensor, g: Tensor, direction: Direction, rows: Rows) -> Tensor:
        """Contributions of one call: float [B].

        Args:
            x: input.
            g: gradient with respect to the output.
            direction: V.
            rows: which rows of x and g are whose.
        """

    def gradients(self, x: Tensor, g: Tensor, weights: Tensor, rows: Rows) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Gradients of `Σ_n weights_n·l_n` with respect to the trainable parameters, for one call.

        Args:
            x: input, as above.
            g: gradient of the unweighted losses with respect to the output; may be overwritten.
            weights: float [B].
            rows: which rows of x and g are whose.
        """
        parameters = {name: p for name, p in self.module.named_parameters(recurse=False) if p.requires_grad}
        copies = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        with torch.enable_grad():
            y = torch.func.functional_call(self.module, copies, (x.detach(),))
            gradients = torch.autograd.grad(y, list(copies.values()), rows.weighted(g, weights).to(y.dtype))
        yield from zip(parameters.values(), gradients, strict=True)


class DenseLayer(Layer):
    """y = x·Wᵀ + b, W [out, in] (`nn.Linear`)."""

    def contract(self, x: Tensor, g: Tensor, direction: Direction, rows: Rows) -> Tensor:
        """As in `Layer`."""
        total = g.new_zeros(rows.count, dtype=precise(g.dtype))
        weight, bias = self._matrix(direction.get(self.module.weight)), direction.get(self.module.bias)
        if weight is not None:
            weight, x = weight.to(g.dtype), x.to(g.dtype)
            # Both orders cost the same; the narrower product is the one that is stored.
            wide = weight.shape[0] > weight.shape[1]
            total += rows.dots(g @ weight, x) if wide else rows.dots(x @ weight.T, g)
        if bias is not None:
            total += rows.sums(g @ bias.to(g.dtype))
        return total

    def gradients(self, x: Tensor, g: Tensor, weights: Tensor, rows: Rows) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """As in `Layer`."""
        module = self.module
        x, g = x.reshape(-1, x.shape[-1]).to(g.dtype), g.reshape(-1, g.shape[-1])
        row_weights = rows.spread(weights, g.shape[0]).to(g.dtype)
        if module.bias is not None and module.bias.requires_grad:
            yield module.bias, row_weights @ g
        if module.weight.requires_grad:
            narrow = x.shape[-1] < g.shape[-1]
            x, g = (x * row_weights[:, None], g) if narrow else (x, g.mul_(row_weights[:, None]))
            yield module.weight, self._gradient(x, g)

    def _matrix(self, weight: Tensor | None) -> Tensor | None:
        """The weight as [out, in]."""
        return weight

    def _gradient(self, x: Tensor, g: Tensor) -> Tensor:
        return g.T @ x


class TransposedDenseLayer(DenseLayer):
    """y = x·W + b, W [in, out] (`transformers.pytorch_utils.Conv1D`)."""

    def _matrix(self, weight: Tensor | None) -> Tensor | None:
        return None if weight is None else weight.T

    def _gradient(self, x: Tensor, g: Tensor) -> Tensor:
        return x.T @ g


class EmbeddingLayer(Layer):
    """y = W[x] (`nn.Embedding`)."""

    def contract(self, x: Tensor, g: Tensor, direction: Direction, rows: Rows) -> Tensor:
        """As in `Layer`."""
        looked_up = F.embedding(x, direction[self.module.weight])
        padding = self.module.padding_idx
        if padding is not None:  # its row gets no gradient, though a tied head gives it a direction
            looked_up = looked_up.masked_fill((x == padding)[..., None], 0)
        return rows.dots(looked_up, g)

    def gradients(self, x: Tensor, g: Tensor, weights: Tensor, rows: Rows) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """As in `Layer`."""
        module, padding = self.module, self.module.padding_idx
        backward = torch.ops.aten.embedding_dense_backward
        padding = -1 if padding is None else padding
        yield module.weight, backward(rows.weighted(g, weights), x, module.num_embeddings, padding, False)


class AffineLayer(Layer):
    """y = normalised(x)·w + b (`nn.LayerNorm`, `nn.GroupNorm`, `nn.RMSNorm`)."""

    def contract(self, x: Tensor, g: Tensor, direction: Direction, rows: Rows) -> Tensor:
        """As in `Layer`."""
        weight, bias = direction.get(self.module.weight), self._bias(direction)
        if weight is None:
            weight = torch.zeros_like(self.module.weight, dtype=None if bias is None else bias.dtype)
        return rows.dots(self._affine(x.to(weight.dtype), weight, bias), g)

    def _bias(self, direction: Direction) -> Tensor | None:
        return direction.get(self.module.bias)

    def normalised(self, x: Tensor) -> Tensor:
        """What the weight multiplies."""
        return self._affine(x, torch.ones_like(self.module.weight), None)

    @abstractmethod
    def _affine(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The module with other parameters."""


class LayerNormLayer(AffineLayer):
    """`nn.LayerNorm`."""

    def _affine(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.layer_norm(x, self.module.normalized_shape, weight, bias, self.module.eps)


class GroupNormLayer(AffineLayer):
    """`nn.GroupNorm`."""

    def _affine(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.group_norm(x, self.module.num_groups, weight, bias, self.module.eps)


class RMSNormLayer(AffineLayer):
    """`nn.RMSNorm`."""

    def _bias(self, direction: Direction) -> Tensor | None:
        return None

    def _affine(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.rms_norm(x, self.module.normalized_shape, weight, self.module.eps)


class ConvolutionLayer(Layer):
    """`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`, with groups, strides, dilation and any padding."""

    def contract(self, x: Tensor, g: Tensor, direction: Direction, rows: Rows) -> Tensor:
        """As in `Layer`."""
        module = self.module
        weight, bias = direction.get(module.weight), direction.get(module.bias)
        weight = torch.zeros_like(module.weight) if weight is None else weight
        bias = None if bias is None else bias.to(g.dtype)
        return rows.dots(module._conv_forward(x.to(g.dtype), weight.to(g.dtype), bias), g)


class ScaleLayer(Layer):
    """A module whose output is affine in its only parameter, such as the RMSNorms of `transformers`."""

    def contract(self, x: Tensor, g: Tensor, direction: Direction, rows: Rows) -> Tensor:
        """As in `Layer`."""
        weight = direction[self.module.weight]
        # For w in (1 + w)·x̂ a small direction would drown in the difference.
        size = weight.abs().max().clamp(min=torch.finfo(weight.dtype).tiny)
        moved = self._output(x, weight / size) - self._output(x, torch.zeros_like(weight))
        return rows.dots(moved, g) * size

    def normalised(self, x: Tensor) -> Tensor:
        """What the weight multiplies."""
        weight = self.module.weight
        return self._output(x, torch.ones_like(weight)) - self._output(x, torch.zeros_like(weight))

    def _output(self, x: Tensor, weight: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(self.module, {"weight": weight}, (x,))
        return output
