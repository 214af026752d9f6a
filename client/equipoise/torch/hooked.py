"""Captures that see every call of a module with parameters."""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from equipoise.torch.capture import Capture
from equipoise.torch.direction import TargetDirection
from equipoise.torch.layers import Layer
from equipoise.torch.rows import Rows


@dataclass(slots=True, eq=False)
class Call:
    """One call of a module in a forward pass.

    Attributes:
        layer: the module.
        x: its input; None while autograd keeps it.
        g: gradient of its output; None until it is known.
        shape: shape to which the input is expanded so that each example has its rows; None: as it is.
        output: shape of its output, with rows for each example.
    """

    layer: Layer
    x: Tensor | None = None
    g: Tensor | None = None
    shape: list[int] | None = None
    output: tuple[int, ...] = ()


class HookedCapture(Capture):
    """Hooks on one batch; gone when the `with` block ends."""

    def __init__(
        self, direction: TargetDirection, ids: ArrayLike, *, layers: dict[nn.Module, Layer], rows: Rows
    ) -> None:
        super().__init__(direction, ids)
        self._layers = layers
        self._rows = rows
        self._handles: list[RemovableHandle] = []
        self._entered: dict[nn.Module, tuple[Call, Tensor]] = {}
        self._hidden: set[str] = set()
        self._contracting = False

    def __enter__(self) -> Self:
        super().__enter__()
        for module in self._layers:
            self._handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._after))
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._entered.clear()

    def _wanted(self) -> bool:
        """Whether a forward pass of now is the captured one: until its losses are known, or when it is recomputed."""
        return self._losses is None or torch._C._current_graph_task_id() != -1

    @abstractmethod
    def _enter(self, call: Call, x: Tensor) -> Tensor:
        """A module is called with x; returns what it gets instead, equal in value."""

    @abstractmethod
    def _leave(self, call: Call, y: Tensor) -> None:
        """A module has given y, which has the shape `call.output` but for views."""

    def _contract(self, call: Call, x: Tensor, g: Tensor) -> Tensor:
        """Contributions of one call: [B]."""
        vectors, count = self._direction.vectors, len(self.ids)
        if not any(parameter in vectors for parameter in call.layer.module.parameters(recurse=False)):
            return g.new_zeros(count, dtype=torch.float32)
        if call.shape is not None:
            x = x.expand(call.shape)
        with self._contraction(g):
            return call.layer.contract(x, g, vectors, count)

    @contextmanager
    def _contraction(self, g: Tensor) -> Iterator[None]:
        """Computations with a layer: a layer may call its module, whose hooks must not take that for a forward pass."""
        self._contracting = True
        try:
            with torch.no_grad(), torch.autocast(g.device.type, enabled=False):
                yield
        finally:
            self._contracting = False

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._contracting or not self._wanted():
            return None
        if not torch.is_grad_enabled():
            self._hidden.add(self._layers[module].path)
            return None
        call = Call(self._layers[module])
        name = None if args else next(iter(kwargs))
        x = args[0] if name is None else kwargs[name]
        self._entered[module] = call, x
        x = self._enter(call, x)
        return ((x, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: x})

    def _after(self, module: nn.Module, _args: tuple[Any, ...], y: Tensor) -> Tensor | None:
        call, x = self._entered.pop(module, (None, None))
        if call is None or x is None or not y.requires_grad:
            return None
        y, call.shape = self._rows.expand(call.layer.path, module, x, y, len(self.ids))
        call.output = y.shape
        self._leave(call, _source(y) if call.shape is None else y)
        return y


def _source(y: Tensor) -> Tensor:
    """Where the gradient of an output arrives even when the output is changed in place afterwards.

    What a module returns is often a view: of a matrix of all rows, say. A change in place gives the view a new history
    that begins at its base.
    """
    base = y._base
    same = base is not None and base.requires_grad and base.numel() == y.numel()
    return base if base is not None and same and base.is_contiguous() and y.is_contiguous() else y
