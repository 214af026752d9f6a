"""The direction that an optimizer would take: its own scaling of each coordinate, frozen."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from equipoise.torch.errors import DirectionError


class AdamPreconditioner:
    """Multiplies a gradient by lr/(√v̂ + ε) of an Adam optimizer, lr relative to the largest, coordinate by coordinate.

    A step of Adam moves the parameters along P·∇l, so that what an example does to the target loss is ∇L_target·P·∇l_n
    (with its own share in v̂ left out): linear in ∇l_n, and had by preconditioning the direction instead. Until the
    optimizer has made a step the gradient stays as it is; afterwards parameters that it has never moved count for
    nothing. The optimizer is only read.

    Args:
        optimizer: Adam, AdamW or another one that keeps `exp_avg_sq` and `step` in its state.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        for name in ("betas", "eps"):
            if any(name not in group for group in optimizer.param_groups):
                kind = type(optimizer).__name__
                raise DirectionError(f"preconditioner = {kind}: must be an Adam optimizer; its groups have no {name}")
        self._optimizer = optimizer

    def __call__(self, gradients: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """The preconditioned gradients."""
        if not any("exp_avg_sq" in state for state in self._optimizer.state.values()):
            return gradients
        largest = max(float(group["lr"]) for group in self._optimizer.param_groups) or 1.0
        return {
            parameter: gradients[parameter].mul(float(group["lr"]) / largest).div_(scale)
            for group in self._optimizer.param_groups
            for parameter in group["params"]
            if parameter in gradients and (scale := _scale(self._optimizer.state.get(parameter), group)) is not None
        }


def _scale(state: dict[str, Any] | None, group: dict[str, Any]) -> Tensor | None:
    """√v̂ + ε of one parameter."""
    if not state or "exp_avg_sq" not in state:
        return None
    second: Tensor = state.get("max_exp_avg_sq", state["exp_avg_sq"])
    correction = 1 - float(group["betas"][1]) ** float(state["step"])
    return torch.sqrt(second).div_(math.sqrt(correction)).add_(float(group["eps"]))
