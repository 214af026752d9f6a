"""Random projections of gradients: a sketch of a few numbers whose inner products are those of the gradients, in mean.

Let x be a layer's input and g the gradient of the per-example losses with respect to its output. A matrix's gradient
Σ_t g_t·x_tᵀ becomes Σ_t (P·g_t)(Q·x_t)ᵀ, which never forms it; a vector's gradient becomes its product with one matrix.
P, Q and the matrix have independent entries ±1/√rows: E[PᵀP] = I, so that inner products of sketches are unbiased.
"""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn

from equipoise.torch.errors import UnsupportedModuleError
from equipoise.torch.kinds import INSTEAD
from equipoise.torch.layers import (
    AffineLayer,
    DenseLayer,
    Direction,
    EmbeddingLayer,
    Layer,
    LayerNormLayer,
    RMSNormLayer,
    ScaleLayer,
    TransposedDenseLayer,
)

SEEN = "sketches see through Linear, Embedding, LayerNorm, RMSNorm and transformers' Conv1D alone"


class Projection(ABC):
    """Sketches of one layer's gradients.

    Args:
        layer: whose.
        width: rows of a projection, k; a matrix becomes k·k numbers, fewer where a side is shorter than k.
        generator: draws the projections.
    """

    def __init__(self, layer: Layer, *, width: int, generator: torch.Generator) -> None:
        self.layer = layer
        self._matrices: dict[nn.Parameter, tuple[Tensor, ...]] = {}
        for parameter in self._parameters():
            rows = width if parameter.ndim == 2 else width * width
            sides = parameter.shape if parameter.ndim == 2 else (parameter.numel(),)
            self._matrices[parameter] = tuple(_signs(rows, side, generator).to(parameter.device) for side in sides)

    @abstractmethod
    def gradients(self, x: Tensor, g: Tensor, count: int) -> dict[nn.Parameter, Tensor]:
        """Sketches of each example's gradients, by parameter: [count, values]; arguments as in `Layer.contract`."""

    def rows(self, x: Tensor, g: Tensor, count: int) -> Tensor:
        """All sketches of each example side by side: [count, K]."""
        found = self.gradients(x, g, count)
        return torch.cat([found[parameter] for parameter in self._matrices], dim=1)

    def vector(self, direction: Direction) -> Tensor:
        """The same sketch of a direction: [K]; a parameter that it lacks has zeros."""
        parts = []
        for parameter, matrices in self._matrices.items():
            value = direction.get(parameter)
            if value is None:
                value = torch.zeros_like(parameter)
            if len(matrices) == 2:
                parts.append(matrices[0] @ value.to(matrices[0]) @ matrices[1].T)
            else:
                parts.append(matrices[0] @ value.to(matrices[0]).reshape(-1))
        return torch.cat([part.reshape(-1) for part in parts])

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.layer.module.parameters(recurse=False) if parameter.requires_grad]

    def _vector_rows(self, parameter: nn.Parameter, per_example: Tensor) -> Tensor:
        matrix = self._matrices[parameter][0]
        return per_example.to(matrix) @ matrix.T


class DenseProjection(Projection):
    """`nn.Linear`: W [out, in]."""

    def gradients(self, x: Tensor, g: Tensor, count: int) -> dict[nn.Parameter, Tensor]:
        """As in `Projection`."""
        module, found = self.layer.module, {}
        if module.weight in self._matrices:
            found[module.weight] = self._weight_rows(self._matrices[module.weight], x, g, count)
        if module.bias is not None and module.bias in self._matrices:
            found[module.bias] = self._vector_rows(module.bias, g.reshape(count, -1, g.shape[-1]).sum(1))
        return found

    def _weight_rows(self, sides: tuple[Tensor, ...], x: Tensor, g: Tensor, count: int) -> Tensor:
        return _outer(g.to(sides[0]) @ sides[0].T, x.to(sides[1]) @ sides[1].T, count)


class TransposedDenseProjection(DenseProjection):
    """`transformers.pytorch_utils.Conv1D`: W [in, out]."""

    def _weight_rows(self, sides: tuple[Tensor, ...], x: Tensor, g: Tensor, count: int) -> Tensor:
        return _outer(x.to(sides[0]) @ sides[0].T, g.to(sides[1]) @ sides[1].T, count)


class EmbeddingProjection(Projection):
    """`nn.Embedding`: W [vocabulary, width], whose input is as good as one-hot."""

    def gradients(self, x: Tensor, g: Tensor, count: int) -> dict[nn.Parameter, Tensor]:
        """As in `Projection`."""
        module = self.layer.module
        left, right = self._matrices[module.weight]
        looked_up = F.embedding(x, left.T)
        if module.padding_idx is not None:  # its row gets no gradient
            looked_up = looked_up.masked_fill((x == module.padding_idx)[..., None], 0)
        return {module.weight: _outer(looked_up, g.to(right) @ right.T, count)}


class NormProjection(Projection):
    """`nn.LayerNorm`, `nn.RMSNorm` and its namesakes: y = normalised(x)·w + b."""

    def gradients(self, x: Tensor, g: Tensor, count: int) -> dict[nn.Parameter, Tensor]:
        """As in `Projection`."""
        module, layer = self.layer.module, self.layer
        assert isinstance(layer, AffineLayer | ScaleLayer)
        found, size = {}, module.weight.numel()
        if module.weight in self._matrices:
            normalised = layer.normalised(x.to(module.weight.dtype))
            found[module.weight] = self._vector_rows(module.weight, (normalised * g).reshape(count, -1, size).sum(1))
        bias = getattr(module, "bias", None)
        if bias is not None and bias in self._matrices:
            found[bias] = self._vector_rows(bias, g.reshape(count, -1, size).sum(1))
        return found


_PROJECTIONS: Mapping[type[Layer], type[Projection]] = {
    DenseLayer: DenseProjection,
    TransposedDenseLayer: TransposedDenseProjection,
    EmbeddingLayer: EmbeddingProjection,
    LayerNormLayer: NormProjection,
    RMSNormLayer: NormProjection,
    ScaleLayer: NormProjection,
}


def check_formulas(model: nn.Module, layers: Mapping[nn.Module, Layer]) -> None:
    """Refuses models with trainable parameters outside of the layers.

    Raises:
        UnsupportedModuleError: there are some; names their modules.
    """
    others = [
        (path, module)
        for path, module in model.named_modules()
        if module not in layers and any(p.requires_grad for p in module.parameters(recurse=False))
    ]
    if others:
        raise UnsupportedModuleError(others, why=SEEN, instead=INSTEAD)


def projections_of(layers: Mapping[nn.Module, Layer], *, width: int, seed: int) -> dict[nn.Module, Projection]:
    """A projection for each layer, drawn from the seed and the layer's path alone.

    Raises:
        UnsupportedModuleError: there is a layer of another kind; names them all.
    """
    unsupported = [(layer.path, module) for module, layer in layers.items() if type(layer) not in _PROJECTIONS]
    if unsupported:
        raise UnsupportedModuleError(unsupported, why=SEEN, instead=INSTEAD)
    found = {}
    for module, layer in layers.items():
        # torch's generator on the CPU takes 32 bits of a seed
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {layer.path}".encode()))
        found[module] = _PROJECTIONS[type(layer)](layer, width=width, generator=generator)
    return found


def _signs(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A random matrix float32 [rows, columns] of ±1/√rows; the unit matrix where it would not shorten anything."""
    if columns <= rows:
        return torch.eye(columns)
    signs: Tensor = (torch.randint(0, 2, (rows, columns), generator=generator) * 2 - 1) / rows**0.5
    return signs


def _outer(left: Tensor, right: Tensor, count: int) -> Tensor:
    """Σ_t left_t·right_tᵀ of each example, flat: [count, k·k]."""
    left, right = (side.reshape(count, -1, side.shape[-1]) for side in (left, right))
    return torch.einsum("nta,ntb->nab", left, right).reshape(count, -1)
