"""What happens in one forward pass: every call of the modules that are looked at."""

from bisect import bisect_right
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from equipoise.torch.forward_mode import detached, tensors_of
from equipoise.torch.graph import Node, position, source
from equipoise.torch.layers import Layer
from equipoise.torch.quiet import ModelState

Source: TypeAlias = tuple[Node, int, tuple[int, ...]]
"""Where the gradient of a tensor arrives, `graph.source`, and the tensor's shape."""


@dataclass(slots=True, eq=False)
class Observed:
    """One call of a module whose formula is known, as it computes: after the user's hooks on its input, before theirs
    on its output.

    Attributes:
        layer: the module.
        start: position in the forward pass before it.
        end: position after it; -1: it is under way.
        x: its input; None where it has a keeper.
        keeper: a function outside of the graph that has saved the input, and gives it back.
        source: node and number of its output, and the output's shape.
        outlet: node and number of the output as it was given: a view, perhaps, of what `source` is of.
    """

    layer: Layer
    start: int
    end: int = -1
    x: Tensor | None = None
    keeper: Any = None
    source: Source = (None, 0, ())
    outlet: tuple[Node, int] = (None, 0)

    @property
    def shape(self) -> tuple[int, ...]:
        """The output's shape."""
        return self.source[2]


@dataclass(slots=True, eq=False)
class Whole:
    """One call of a module with all of its hooks: what goes in and what comes out.

    Attributes:
        path: name of the module in the model.
        module: the module.
        parent: the call that it is part of.
        start: position in the forward pass before it.
        end: position after it; -1: it is under way.
        held: whether it can be called again: its arguments are kept. Under activation checkpointing, where they
            would be the memory that is saved, they are only when it is known that they are needed.
        args: arguments by position, cut from their graphs.
        kwargs: arguments by name, cut from their graphs.
        versions: how often each tensor among the arguments had been changed in place.
        outputs: of an outermost call its floating outputs that have gradients, by their places among all of them; of
            others until the call is over that they are part of.
        parts: the calls that are part of it, while it is under way.
        sources: node, number and shape of each output that has gradients, by its place among all.
        prints: some sums of each of these outputs, by which it is known again.
        coarse: whether an output is in half precision.
        single: whether an output is in less than double precision.
        g: gradients of the outputs, by place.
        state: the module, and the random generators, before it; None: it will not be called again.
        autocast: (enabled, dtype) of automatic mixed precision.
    """

    path: str
    module: nn.Module
    parent: "Whole | None"
    start: int
    held: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: list[int]
    state: ModelState | None
    autocast: tuple[str, bool, torch.dtype]
    end: int = -1
    outputs: dict[int, Tensor] = field(default_factory=dict)
    parts: "list[Whole]" = field(default_factory=list)
    sources: dict[int, Source] = field(default_factory=dict)
    prints: dict[int, Tensor] = field(default_factory=dict)
    coarse: bool = False
    single: bool = False
    g: dict[int, Tensor] = field(default_factory=dict)

    def changed(self) -> bool:
        """Whether an argument has been changed in place since the call began."""
        return [tensor._version for tensor in tensors_of((self.args, self.kwargs))] != self.versions

    def encloses(self, number: int) -> bool:
        """Whether the node of this number was made in this call."""
        return self.start <= number < self.end


class Observer(Protocol):
    """Who is told of calls."""

    def wants(self) -> bool:
        """Whether a forward pass of now is the captured one."""

    def enter(self, call: Observed, x: Tensor) -> Tensor:
        """A module is called with x; returns what it gets instead, equal in value."""

    def leave(self, call: Observed, y: Tensor) -> None:
        """A module has given y."""


class Recorder:
    """Hooks on modules while a forward and backward pass is captured.

    Args:
        layers: modules whose formula is known.
        wholes: by module the path of those that are looked at as a whole.
        observer: who is told.
        once: of the whole modules those that will not be called again, so that nothing is kept for it.
        again: those that will be.
        survey: whether all modules are looked at, and it is not known yet which others will be.

    Attributes:
        observed: calls of modules with a formula, in order.
        wholes: calls of whole modules, in the order in which they began.
        layers: as given.
        survey: as given.
        hidden: modules that were called without gradients.
    """

    def __init__(
        self,
        layers: dict[nn.Module, Layer],
        wholes: dict[nn.Module, str],
        observer: Observer,
        *,
        once: Collection[nn.Module] = (),
        again: Collection[nn.Module] = (),
        survey: bool = False,
    ) -> None:
        self.observed: list[Observed] = []
        self.wholes: list[Whole] = []
        self.hidden: set[nn.Module] = set()
        self.layers = layers
        self._paths = wholes
        self.survey = survey
        self._once = set(once)
        self._again = set(again)
        self._observer = observer
        self._handles: list[RemovableHandle] = []
        self._entered: Observed | None = None
        self._stack: list[Whole] = []

    def attach(self) -> None:
        """Registers the hooks: those of whole modules around all others, those with a formula inside of them."""
        for module in self.layers:
            self._handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leave, prepend=True))
        for module in self._paths:
            self._handles.append(module.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True))
            self._handles.append(module.register_forward_hook(self._end))

    def detach(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._entered = None
        self._stack.clear()

    def leave(self) -> None:
        """The losses are known: a call that is still under way, around their computation, is none of the model's."""
        for outer in self._stack:
            self.wholes.remove(outer)
            for part in outer.parts:
                part.parent = None
        self._stack.clear()

    def forget(self) -> None:
        """Lets go of what was recorded."""
        self.observed, self.wholes, self._entered = [], [], None

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._observer.wants():
            return None
        if not torch.is_grad_enabled():
            self.hidden.add(module)
            return None
        call = Observed(self.layers[module], position())
        name = None if args else next(iter(kwargs))
        x = args[0] if name is None else kwargs[name]
        self._entered = call  # one at most: recomputing ends within a module that is never left
        x = self._observer.enter(call, x)
        return ((x, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: x})

    def _leave(self, module: nn.Module, _args: Any, y: Tensor) -> None:
        call, self._entered = self._entered, None
        if call is None or call.layer.module is not module or not y.requires_grad:
            return
        edge = get_gradient_edge(y)
        call.end, call.source, call.outlet = position(), (*source(y), tuple(y.shape)), (edge.node, edge.output_nr)
        if not _recomputing():
            self.observed.append(call)
        self._observer.leave(call, y)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._observer.wants() or _recomputing():
            return
        if not torch.is_grad_enabled():
            self.hidden.add(module)
            return
        again = module in self._again or (module not in self._once and not (self.survey and _checkpointed()))
        device = next((p.device.type for p in module.parameters()), "cpu")
        held: Any = detached((args, kwargs)) if again else ((), {})
        call = Whole(
            path=self._paths[module],
            module=module,
            parent=self._stack[-1] if self._stack else None,
            start=position(),
            held=again,
            args=held[0],
            kwargs=held[1],
            versions=[tensor._version for tensor in tensors_of(held)],
            state=ModelState(module) if again else None,
            autocast=(device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)),
        )
        self.wholes.append(call)
        if call.parent is not None:
            call.parent.parts.append(call)
        self._stack.append(call)

    def _end(self, module: nn.Module, _args: Any, output: Any) -> None:
        if not any(call.module is module for call in self._stack):
            return
        while (call := self._stack.pop()).module is not module:
            pass  # of a call that failed
        call.end = position()
        for part in call.parts:
            part.outputs.clear()
        call.parts.clear()
        for place, y in enumerate(tensors_of(output)):
            if not y.requires_grad:
                continue
            edge = get_gradient_edge(y)
            call.sources[place] = edge.node, edge.output_nr, tuple(y.shape)
            call.coarse |= y.dtype.itemsize < 4
            call.single |= y.dtype.itemsize < 8
            call.outputs[place] = y
            if self.survey or module not in self._once:
                call.prints[place] = fingerprint(y)


class Spans:
    """Calls by position: those of modules with a formula, which do not lie in each other."""

    def __init__(self, calls: Iterable[Observed]) -> None:
        self._calls = sorted(calls, key=lambda call: call.start)
        self._starts = [call.start for call in self._calls]

    def at(self, number: int) -> Observed | None:
        """The call in which the node of this number was made."""
        index = bisect_right(self._starts, number) - 1
        if index < 0 or number < 0:
            return None
        call = self._calls[index]
        return call if number < call.end else None


def fingerprint(y: Tensor) -> Tensor:
    """A few sums of a tensor, float [3]: equal for equal tensors, and hardly ever for others."""
    with torch.no_grad():
        flat = y.detach().reshape(-1).float()
        return torch.stack([flat.sum(), flat.norm(), flat[::3].sum()])


def _checkpointed() -> bool:
    """Whether what is saved for the backward pass is packed: activation checkpointing, offloading."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # not in older torch
    return top is not None and top(True) is not None


def _recomputing() -> bool:
    """Whether this forward pass is made by a backward pass: activation checkpointing."""
    return bool(torch._C._current_graph_task_id() != -1)
