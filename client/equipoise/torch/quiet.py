"""Looking at a model without leaving a trace: modes, random numbers, buffers and attributes stay as they are."""

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from equipoise.torch.processes import reshard


class ModelState:
    """What a forward pass changes, or depends on, beside parameters and inputs, at the time it is made.

    That is torch's random generators on the devices of the model, and of its modules the buffers, whether they are in
    training, and the attributes of Python: counters, the auxiliary loss of a router, lists of such.
    """

    def __init__(self, model: nn.Module) -> None:
        devices = {parameter.device for parameter in model.parameters()}
        self._devices = [device for device in devices if device.type != "cpu"]
        self._cpu = torch.get_rng_state()
        self._others = [torch.get_device_module(device).get_rng_state(device) for device in self._devices]
        self._buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if not is_lazy(buffer)]
        self._attributes = [
            (module, type(module), {name: (value, _contents(value)) for name, value in _attributes(module).items()})
            for module in model.modules()
        ]

    def restore(self) -> None:
        """Sets all of it to this state."""
        torch.set_rng_state(self._cpu)
        for device, state in zip(self._devices, self._others, strict=True):
            torch.get_device_module(device).set_rng_state(state, device)
        for buffer, value in self._buffers:
            buffer.data.copy_(value)
        for module, kind, attributes in self._attributes:
            if type(module) is not kind:
                continue  # a lazy one, which knew its shape, and its class, from that pass on
            for name in _attributes(module).keys() - attributes.keys():
                del module.__dict__[name]
            for name, (was, contents) in attributes.items():
                module.__dict__[name] = was
                _refill(was, contents)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Afterwards the model and the random generators are as before."""
    before = ModelState(model)
    try:
        yield
    finally:
        before.restore()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode; afterwards the model and the random generators are as before."""
    with untouched(model):
        model.eval()
        yield


@contextmanager
def repeating(model: nn.Module, before: ModelState) -> Iterator[None]:
    """Another forward pass from the state before the first; the model and the generators are as now after it.

    Args:
        model: the model.
        before: its state before the first pass.
    """
    now = ModelState(model)
    before.restore()
    try:
        yield
    finally:
        now.restore()


@contextmanager
def moved(model: nn.Module, steps: Mapping[nn.Parameter, Tensor], scale: float) -> Iterator[None]:
    """Parameters moved by `scale` times a step; put back as copies of what they were, bit for bit.

    Not noticed by autograd: graphs recorded before stay valid after it. Of a sharded model the shards move.
    """
    saved = {parameter: parameter.data.clone() for parameter in steps}
    reshard(model)
    try:
        for parameter, step in steps.items():
            parameter.data.add_(step.to(parameter.dtype), alpha=scale)
        yield
    finally:
        for parameter, value in saved.items():
            parameter.data.copy_(value)
        reshard(model)


_INTERNALS = nn.Module().__dict__.keys() - {"training"}


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in module.__dict__.items() if name not in _INTERNALS}


def _contents(value: Any) -> Any:
    """A copy of what may be changed in place; None: nothing."""
    if type(value) in (list, dict, set, deque):
        return value.copy()
    plain = isinstance(value, Tensor) and not value.requires_grad  # what has a graph is not changed in place
    return value.clone() if plain and not is_lazy(value) else None


def _refill(value: Any, contents: Any) -> None:
    if isinstance(contents, Tensor):
        value.data.copy_(contents)
    elif contents is not None:
        value.clear()
        if isinstance(value, list | deque):
            value.extend(contents)
        else:
            value.update(contents)
