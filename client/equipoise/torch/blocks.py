"""Modules taken as a whole: any module, by forward-mode differentiation of another call of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from equipoise.torch.calls import Whole, fingerprint
from equipoise.torch.forward_mode import tangents_of
from equipoise.torch.layers import Direction
from equipoise.torch.quiet import repeating
from equipoise.torch.rows import Layout, precise

CHANGED = "gives something else when it is called again"


@dataclass(slots=True, eq=False)
class Block:
    """A module and the parameters that it answers for, wherever in it they are used.

    With y what it gives, g its gradient and V a direction, an example's contribution is ⟨∂y/∂θ·V, g⟩ over its rows:
    exact for whatever the module does inside, and about two of its forward passes.

    Attributes:
        path: its name in the model.
        module: the module.
        parameters: those it answers for, by their names in it.
        places: which of its outputs enter the losses.
        silent: which seem to, and have no gradient.
        rehearsed: whether it is known that it can be called again.
    """

    path: str
    module: nn.Module
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    places: set[int] = field(default_factory=set)
    silent: set[int] = field(default_factory=set)
    rehearsed: bool = False

    def answer_for(self, parameter: nn.Parameter) -> None:
        """Takes one more parameter, which must be the module's."""
        name = next(name for name, own in self.module.named_parameters() if own is parameter)
        self.parameters[name] = parameter

    def contract(self, call: Whole, direction: Direction, layout: Layout) -> Tensor:
        """Contributions of one call, from the gradients of its outputs: [B]."""
        total = torch.zeros(layout.count, device=next((g.device for g in call.g.values()), None))
        moves = {name: direction[p] for name, p in self.parameters.items() if p in direction}
        if not moves or not call.g:
            return total
        _, tangents = self._again(call, moves)
        for place, g in call.g.items():
            tangent, rows = tangents[place], layout.rows(tuple(g.shape))
            if rows is None:  # an output that did not enter the losses before
                return total.fill_(torch.nan)
            if tangent is not None:
                total = total.to(precise(g.dtype)) + rows.dots(tangent.to(g.dtype), g)
        return total

    def rehearse(self, call: Whole) -> str:
        """Why the module cannot be differentiated, if so: an operation without forward mode, or another result."""
        moves = {name: torch.zeros_like(parameter) for name, parameter in self.parameters.items()}
        try:
            values, _ = self._again(call, moves)
        except (NotImplementedError, RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            return f"cannot be called again under forward-mode differentiation: {str(error).splitlines()[0][:200]}"
        for place, (_, _, shape) in call.sources.items():
            if place >= len(values) or tuple(values[place].shape) != shape:
                return CHANGED
            then, now = call.prints[place], fingerprint(values[place])
            if not torch.allclose(then, now, rtol=1e-2, atol=1e-2 * float(then[1]), equal_nan=True):
                return CHANGED
        return ""

    def _again(self, call: Whole, moves: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
        with _as_then(call), torch.no_grad():
            return tangents_of(self.module, moves, call.args, call.kwargs)


@contextmanager
def _as_then(call: Whole) -> Iterator[None]:
    """The module as it was when it was called; afterwards it and the random generators are as now."""
    device, enabled, dtype = call.autocast
    assert call.state is not None
    with repeating(call.module, call.state), torch.autocast(device, enabled=enabled, dtype=dtype, cache_enabled=False):
        yield
