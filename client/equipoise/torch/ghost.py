"""Contributions from the training backward pass itself: `ghost`, and its last-layer variant."""

from collections.abc import Collection
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from equipoise.torch.capture import Contributions
from equipoise.torch.direction import TargetDirection
from equipoise.torch.errors import CaptureError, UnsupportedModuleError
from equipoise.torch.hooked import Call, HookedCapture
from equipoise.torch.kinds import Kinds, check_eager, check_whole, layers_of
from equipoise.torch.layers import Layer
from equipoise.torch.rows import Rows


class GhostCapture(HookedCapture):
    """One forward and backward pass; the contributions are known after the backward pass."""

    def __init__(
        self, direction: TargetDirection, ids: ArrayLike, *, layers: dict[nn.Module, Layer], rows: Rows
    ) -> None:
        super().__init__(direction, ids, layers=layers, rows=rows)
        self._sum: Tensor | None = None
        self._scale: Tensor | None = None
        self._waiting = 0
        self._missed = ""

    def watch(self, losses: Tensor) -> Tensor:
        """As in `Capture`; the backward pass must go through the losses that are returned."""
        super().watch(losses)
        # The gradient that arrives here is what each example's loss was multiplied by: weight, mean over the batch,
        # accumulation, the scale of a GradScaler, all at once and exactly.
        losses.register_hook(self._see_scale)  # type: ignore[no-untyped-call]
        return losses

    def _contributions(self) -> Tensor:
        if self._scale is None:
            raise CaptureError(
                "no backward pass was captured: it belongs into the `with` block, after the forward pass"
            )
        if self._sum is None or self._waiting:
            raise CaptureError("the backward pass did not go through the whole model: call `.backward()`")
        if self._missed:
            raise CaptureError(f"{self._missed}: its output was replaced before its gradient could be seen")
        known = self._scale != 0
        contributions = self._sum / torch.where(known, self._scale, 1).to(self._sum)
        return torch.where(known & contributions.isfinite(), contributions, torch.nan)

    def _see_scale(self, scale: Tensor) -> None:
        if self._open:
            self._scale = scale.detach() if self._scale is None else self._scale + scale.detach()

    def _enter(self, call: Call, x: Tensor) -> Tensor:
        if x.requires_grad:
            kept: Tensor = _Keep.apply(x, call, self)  # type: ignore[no-untyped-call]
            return kept
        call.x = x
        return x

    def _leave(self, call: Call, y: Tensor) -> None:
        def see(g: Tensor) -> None:
            if not self._open:
                return
            g = g.reshape(call.output)
            if call.x is None:
                call.g, self._waiting = g, self._waiting + 1
            else:
                self._add(call, call.x, g)

        y.register_hook(see)  # type: ignore[no-untyped-call]

    def see_input(self, call: Call, x: Tensor) -> None:
        """Autograd has given back the input of a call, after the gradient of its output."""
        if call.g is None:
            self._missed = call.layer.path
        else:
            g, call.g, self._waiting = call.g, None, self._waiting - 1
            self._add(call, x, g)

    def _add(self, call: Call, x: Tensor, g: Tensor) -> None:
        part = self._contract(call, x, g)
        self._sum = part if self._sum is None else self._sum + part.to(self._sum)


class GhostContributions(Contributions[GhostCapture]):
    """Contributions from hooks on the training backward pass: exact, for about a third of a step more.

    Each module's input and output gradient are contracted with the direction as they appear, so that no gradient of an
    example is ever formed and no memory beyond one layer's activations is taken. The contributions of a step are known
    after its backward pass: the weights that the service answers are for the next visit of these examples. Rows that
    were trained with weight 0 have no gradient to see: their contributions are NaN and not scored.

    Works with gradient accumulation (one capture for each micro-batch), autocast and GradScaler, activation
    checkpointing, DistributedDataParallel, any attention kernel, tied weights, frozen parameters, and with losses
    averaged over the tokens of an example, padding or not.

    Example:
        >>> contributions = GhostContributions(model, direction)
        >>> for ids, batch in loader:
        ...     with contributions.capture(ids) as capture:
        ...         losses = capture.losses(batch)
        ...         weighted_mean(losses, client.weights(ids)).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     client.submit(ids, **capture.fields())

    Args:
        model: the model in training.
        direction: where learning should go.
        shared: paths of embeddings that are called with one index for each position rather than each example, as
            `nn.Embedding(positions)(torch.arange(length))`; found out where the two numbers differ.
        also: types of your own modules with parameters that treat each example alone; they are differentiated by
            forward mode.

    Raises:
        UnsupportedModuleError: the model has trainable parameters in other modules, or is compiled or sharded.
    """

    def __init__(
        self, model: nn.Module, direction: TargetDirection, *, shared: Collection[str] = (), also: Kinds = ()
    ) -> None:
        super().__init__(model, direction)
        self._also = also
        self._rows = Rows(shared)
        self._refreshed()

    def _refreshed(self) -> None:
        check_eager(self.model)
        check_whole(self.model)
        self._layers = layers_of(self.model, also=self._also)

    def _capture(self, ids: ArrayLike) -> GhostCapture:
        return GhostCapture(self.direction, ids, layers=self._layers, rows=self._rows)


class LastLayerContributions(GhostContributions):
    """What one layer sees of the contributions: nearly free, and an approximation.

    Only the parameters of one linear layer count, by default the last one of the model (measured on a small GPT:
    Spearman 0.86 with the exact contributions). The rest of the model may be anything, compiled too.

    Args:
        model: the model in training.
        direction: where learning should go.
        layer: path of the layer, such as `lm_head`; default: the last `nn.Linear` of the model.

    Raises:
        UnsupportedModuleError: the layer is of another kind.
    """

    def __init__(self, model: nn.Module, direction: TargetDirection, *, layer: str | None = None) -> None:
        self._path = _last_linear(model) if layer is None else layer
        super().__init__(model, direction)

    def _refreshed(self) -> None:
        module = self.model.get_submodule(self._path)
        check_eager(module)
        check_whole(module)
        self._layers = layers_of(module, prefix=self._path)
        if not self._layers:
            raise UnsupportedModuleError(
                [(self._path, module)], why="has no trainable parameter", instead="name another layer"
            )


def _last_linear(model: nn.Module) -> str:
    paths: list[str] = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not paths:
        raise UnsupportedModuleError([("", model)], why="has no nn.Linear", instead="name a layer")
    return paths[-1]


class _Keep(torch.autograd.Function):
    """The input of a call, kept with its graph and given back on the way back.

    What a function saves is recomputed under activation checkpointing and offloaded as everything else; a reference of
    our own would defeat both.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Call, capture: GhostCapture) -> Tensor:
        ctx.call, ctx.capture = call, capture
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (x,) = ctx.saved_tensors
        ctx.capture.see_input(ctx.call, x)
        return gradients[0], None, None
