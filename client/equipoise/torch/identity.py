"""What must hold at every step: Σ s_n·c_n = ⟨V, gradient⟩, s_n being what the loss of example n was multiplied by."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from equipoise.torch.layers import Direction

if TYPE_CHECKING:
    from equipoise.torch.coverage import Coverage

_log = logging.getLogger(__name__)

_TOLERANCE = {torch.float64: 1e-6}


class Identity:
    """Watches the gradients of one backward pass and compares them with the contributions.

    Both sides are known on a step with hooks. They differ when a parameter was used where no hook saw it, and when the
    backward pass had other losses in it than the ones that were given to `watch`.

    Args:
        vectors: V.
        parameters: those that are accounted for.
    """

    def __init__(self, vectors: Direction, parameters: Sequence[nn.Parameter]) -> None:
        self.checked = False
        self._products: dict[nn.Parameter, Tensor] = {}
        self._size = torch.zeros(())
        self._vectors = vectors
        self._handles = [
            parameter.register_hook(self._watcher(parameter))  # type: ignore[no-untyped-call]
            for parameter in parameters
            if parameter in vectors
        ]

    def detach(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def check(self, weighted: Tensor, parts: Mapping[nn.Module, Tensor], coverage: "Coverage") -> None:
        """Compares; a difference is counted and logged with its likely cause.

        Args:
            weighted: s_n·c_n of each example, [B].
            parts: what each module gave of their sum.
            coverage: who accounts for what.
        """
        self.checked = True
        if not self._products:
            return
        gap, size = self._compare(weighted)
        if not math.isfinite(gap + size):
            return
        coverage.watched += 1
        tolerance = 0.1 if coverage.coarse else _TOLERANCE.get(weighted.dtype, 1e-2)
        if gap > tolerance * size:
            coverage.gaps += 1
            level = logging.WARNING if coverage.gaps == 1 else logging.INFO
            _log.log(
                level,
                "The contributions and the gradient of this step do not belong together: Σ s·c and ⟨V, gradient⟩ "
                "differ by %.2g of their size. %s",
                gap / size if size else gap,
                self._cause(parts, coverage),
            )

    def _watcher(self, parameter: nn.Parameter) -> Callable[[Tensor], None]:
        def see(gradient: Tensor) -> None:
            dense = (gradient.to_dense() if gradient.is_sparse else gradient).detach()
            vector = self._vectors[parameter]
            product = product_of(dense, vector)
            self._products[parameter] = self._products.get(parameter, 0) + product
            self._size = self._size.to(product) + product.abs()

        return see

    def _compare(self, weighted: Tensor) -> tuple[float, float]:
        total = torch.stack(list(self._products.values())).sum()
        sums = weighted.double()
        gap = (sums.sum() - total).abs()
        return float(gap), float(torch.maximum(sums.abs().sum(), self._size))

    def _cause(self, parts: Mapping[nn.Module, Tensor], coverage: "Coverage") -> str:
        """The module whose share differs most."""
        assert coverage.plan is not None
        worst, name = 0.0, ""
        accounts = {module: set(claims) for module, claims in coverage.plan.claims.items()}
        for module, block in coverage.plan.blocks.items():
            accounts.setdefault(module, set()).update(block.parameters.values())
        shares = dict.fromkeys(coverage.trainable, 0)
        for parameters in accounts.values():
            for parameter in parameters:
                shares[parameter] += 1
        for module, parameters in accounts.items():
            if all(shares[parameter] == 1 for parameter in parameters):
                own = sum(float(self._products.get(parameter, 0)) for parameter in parameters)
                gap = abs(own - float(parts.get(module, 0)))
                if gap > worst:
                    worst, name = gap, coverage.name_of(module)
        where = f"Most of it is in {name}. " if name else ""
        return (
            f"{where}Is there another loss in the backward pass than the ones given (an auxiliary loss, a penalty), or "
            "does a hook change gradients? Give all of the loss to `watch`, example by example, or use "
            "JvpContributions(model, direction)"
        )


def inner_product(
    direction: Direction, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]
) -> Tensor:
    """⟨V, gradient⟩ in float64, without dimensions."""
    total = torch.zeros((), dtype=torch.float64)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None and parameter in direction:
            dense = gradient.to_dense() if gradient.is_sparse else gradient
            product = product_of(dense, direction[parameter])
            total = total.to(product.device) + product
    return total


def product_of(gradient: Tensor, vector: Tensor) -> Tensor:
    """⟨V, gradient⟩ of one parameter in float64, without dimensions; of a complex one its real part."""
    products = gradient.to(vector.dtype).conj() * vector
    return products.real.sum(dtype=torch.float64)
