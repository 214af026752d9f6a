"""Looking at a model without leaving a trace: modes, random numbers, buffers and hooks stay as they are."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from equipoise.torch.processes import reshard


class RandomState:
    """The state of torch's random generators on the devices of a model, at the time it is made."""

    def __init__(self, model: nn.Module) -> None:
        devices = {parameter.device for parameter in model.parameters()}
        self._devices = [device for device in devices if device.type != "cpu"]
        self._cpu = torch.get_rng_state()
        self._others = [torch.get_device_module(device).get_rng_state(device) for device in self._devices]

    def restore(self) -> None:
        """Sets the generators to this state."""
        torch.set_rng_state(self._cpu)
        for device, state in zip(self._devices, self._others, strict=True):
            torch.get_device_module(device).set_rng_state(state, device)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode; afterwards the mode of each module and the random generators are as before."""
    modes = {module: module.training for module in model.modules()}
    random = RandomState(model)
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        random.restore()


@contextmanager
def repeating(model: nn.Module, random: RandomState) -> Iterator[None]:
    """A second forward pass that sees the random numbers of the first; generators and buffers are as before after it.

    Args:
        model: the model.
        random: the state before the first pass.
    """
    now = RandomState(model)
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    random.restore()
    try:
        yield
    finally:
        now.restore()
        for buffer, value in buffers:
            buffer.data.copy_(value)


@contextmanager
def moved(model: nn.Module, steps: dict[nn.Parameter, Tensor], scale: float) -> Iterator[None]:
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
