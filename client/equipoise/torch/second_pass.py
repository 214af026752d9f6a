"""Contributions from a second forward pass: finite differences, and forward-mode differentiation as the reference."""

from abc import abstractmethod
from functools import partial
from typing import Any, Never

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from equipoise.torch.capture import Capture, Contributions
from equipoise.torch.direction import TargetDirection, norm_of
from equipoise.torch.errors import CaptureError, DirectionError, UnsupportedModuleError
from equipoise.torch.forward_mode import tangents_of
from equipoise.torch.kinds import BY_DIFFERENCES, check_whole, compiled_modules, takes_hooks
from equipoise.torch.layers import Direction
from equipoise.torch.processes import unwrapped
from equipoise.torch.quiet import ModelState, moved, repeating


class SecondPassCapture(Capture):
    """Two forward passes over one batch; the contributions are known before the backward pass."""

    def __init__(self, model: nn.Module, direction: TargetDirection, ids: ArrayLike | None) -> None:
        super().__init__(direction, ids)
        self._model = model
        self._known: Tensor | None = None

    def losses(self, batch: Any) -> Tensor:
        """The training forward pass, and a second one that leaves no trace: same dropout, same buffers."""
        model = unwrapped(self._model)
        before = ModelState(model)
        losses = self._first(batch)
        found = []
        for vectors in self._along:
            with repeating(model, before):
                found.append(self._second(batch, losses.detach(), vectors))
        self._known = torch.stack(found)
        return losses

    def watch(self, losses: Tensor) -> Never:
        """Not possible here: the second pass needs the batch."""
        raise CaptureError(
            "this method makes a forward pass of its own: use `capture.losses(batch)`, or `loss` instead of `weigh`"
        )

    def _first(self, batch: Any) -> Tensor:
        return Capture.watch(self, self._direction.losses(batch))

    @abstractmethod
    def _second(self, batch: Any, losses: Tensor, vectors: Direction) -> Tensor:
        """Contributions along the vectors, [B], from a second pass."""

    def _contributions(self) -> Tensor:
        assert self._known is not None
        return self._known


class FiniteDifferenceCapture(SecondPassCapture):
    """(l(θ + ε·v/|v|) − l(θ))·|v|/ε."""

    def __init__(
        self, model: nn.Module, direction: TargetDirection, ids: ArrayLike | None, *, step: float, checked: bool
    ) -> None:
        super().__init__(model, direction, ids)
        self._step = step
        self._checked = checked

    def _first(self, batch: Any) -> Tensor:
        if self._checked:
            return super()._first(batch)
        handles = [
            module.register_forward_pre_hook(_refuse_autocast)
            for module in self._model.modules()
            if takes_hooks(module) and next(module.parameters(recurse=False), None) is not None
        ]
        try:
            return super()._first(batch)
        finally:
            for handle in handles:
                handle.remove()

    def _second(self, batch: Any, losses: Tensor, vectors: Direction) -> Tensor:
        norm = norm_of(vectors)
        with moved(self._model, vectors, self._step / float(norm)):
            shifted = self._direction.without_graph(partial(self._direction.quiet_losses, batch)).detach()
        return (shifted.double() - losses.double()) * (norm.to(losses.device) / self._step)


class FiniteDifferenceContributions(Contributions[FiniteDifferenceCapture]):
    """Contributions from one more forward pass, at parameters moved a little along the direction.

    Works for any model and any kernel, compiled ones too, and knows the contributions before the backward pass: weights
    of the same step, zero-weight examples included; sharded models (`fully_shard`) too. The price: about 0.4 of a step,
    an error of about 0.5 %, and parameters and forward pass in float32 (a bfloat16 difference is mostly rounding). The
    parameters are put back bit for bit, dropout repeats itself, and buffers and random generators stay as they were.

    Example:
        >>> contributions = FiniteDifferenceContributions(model, direction)
        >>> for ids, batch in loader:
        ...     with contributions.capture(ids) as capture:
        ...         losses = capture.losses(batch)
        ...         weights = client.step(ids, **capture.fields()).weights
        ...         weighted_mean(losses, weights).backward()

    Args:
        model: the model in training.
        direction: where learning should go.
        step: length of the move in parameter space.

    Raises:
        UnsupportedModuleError: trainable parameters have less precision than float32.
    """

    tolerance = 0.5
    sees_noise = False
    watches = False

    def __init__(self, model: nn.Module, direction: TargetDirection, *, step: float = 1e-3) -> None:
        super().__init__(model, direction)
        if not step > 0:
            raise DirectionError(f"step = {step}: must be positive")
        self._step = step
        # Hooks would have a compiled model compile again; they look at the first forward pass of any other.
        self._checked = bool(compiled_modules(model))
        self._refreshed()

    def _refreshed(self) -> None:
        coarse = [
            (path, module)
            for path, module in self.model.named_modules()
            if any(p.requires_grad and p.dtype.itemsize < 4 for p in module.parameters(recurse=False))
        ]
        if coarse:
            raise UnsupportedModuleError(
                coarse, why="finite differences need float32 parameters", instead="GhostContributions does not"
            )

    def _capture(self, ids: ArrayLike | None) -> FiniteDifferenceCapture:
        checked, self._checked = self._checked, True
        return FiniteDifferenceCapture(self.model, self.direction, ids, step=self._step, checked=checked)


class JvpCapture(SecondPassCapture):
    """Forward-mode differentiation of the losses along the direction."""

    def _second(self, batch: Any, losses: Tensor, vectors: Direction) -> Tensor:
        model = unwrapped(self._model)
        moves = {f"model.{name}": vectors[p] for name, p in model.named_parameters() if p in vectors}
        try:
            losses_of = _Losses(model, self._direction.example_losses)
            _, (tangent,) = self._direction.without_graph(partial(tangents_of, losses_of, moves, (batch,), {}))
        except NotImplementedError as error:
            why = f"an operation in it has no forward mode ({str(error).splitlines()[0][:200]})"
            raise UnsupportedModuleError([("", model)], why=why, instead=BY_DIFFERENCES) from error
        return torch.zeros_like(losses) if tangent is None else tangent


class JvpContributions(Contributions[JvpCapture]):
    """Contributions by forward-mode differentiation: exact, for about a step more; the reference for the others.

    Used like `FiniteDifferenceContributions`. Attention runs on the unfused kernel, since no fused one has a forward
    mode; custom kernels may have none either.

    Args:
        model: the model in training.
        direction: where learning should go.

    Raises:
        UnsupportedModuleError: the model is sharded; a capture raises it where an operation has no forward mode.
    """

    def __init__(self, model: nn.Module, direction: TargetDirection) -> None:
        super().__init__(model, direction)
        check_whole(model)

    watches = False

    def _capture(self, ids: ArrayLike | None) -> JvpCapture:
        return JvpCapture(self.model, self.direction, ids)


class _Losses(nn.Module):
    """A loss function as a module, so that parameters can be replaced in it."""

    def __init__(self, model: nn.Module, losses: Any) -> None:
        super().__init__()
        self.model = model
        self.losses = losses

    def forward(self, batch: Any) -> Any:
        return self.losses(self.model, batch)


def _refuse_autocast(module: nn.Module, _args: Any) -> None:
    device = next(module.parameters(recurse=False)).device.type
    if torch.is_autocast_enabled(device):
        raise CaptureError(
            "finite differences in autocast's half precision are mostly rounding: leave the forward pass in float32, "
            "or use GhostContributions"
        )
