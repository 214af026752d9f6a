"""Score and train in one step: contributions first, then the exact gradient under the weights they earn."""

from collections.abc import Collection

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.autograd.graph import GradientEdge, get_gradient_edge

from equipoise.torch.capture import Contributions
from equipoise.torch.direction import TargetDirection
from equipoise.torch.errors import CaptureError, UnsupportedModuleError
from equipoise.torch.hooked import Call, HookedCapture
from equipoise.torch.kinds import Kinds, check_eager, check_whole, layers_of
from equipoise.torch.layers import Layer
from equipoise.torch.losses import as_weights
from equipoise.torch.processes import replicated_modules
from equipoise.torch.rows import Rows


class OnePassCapture(HookedCapture):
    """A forward pass whose backward pass is made here, in two halves."""

    def __init__(
        self,
        direction: TargetDirection,
        ids: ArrayLike,
        *,
        layers: dict[nn.Module, Layer],
        rows: Rows,
        scaler: GradScaler | None,
    ) -> None:
        super().__init__(direction, ids, layers=layers, rows=rows)
        self._scaler = scaler
        self._seen: list[tuple[Call, GradientEdge]] = []
        self._graph: Tensor | None = None
        self._scored: Tensor | None = None
        self._scale = 1.0

    def watch(self, losses: Tensor) -> Tensor:
        """As in `Capture`; the losses that are returned cannot be differentiated: `backward` does it."""
        super().watch(losses)
        self._graph = losses
        return losses.detach()

    def backward(self, weights: ArrayLike | Tensor) -> None:
        """Adds the gradient of `mean(weights·losses)` to `.grad`, as a backward pass would, exactly.

        Args:
            weights: [B], such as those of a `StepResult`. With gradient accumulation over k micro-batches: divided
                by k.

        Raises:
            CaptureError: it was called before.
        """
        _ = self.contributions
        if not self._seen:
            raise CaptureError("a capture makes one backward pass")
        assert self._losses is not None
        factors = as_weights(weights, self._losses) / len(self.ids)
        while self._seen:
            self._accumulate(self._seen.pop()[0], factors)

    def _contributions(self) -> Tensor:
        if self._scored is None:
            self._scored = self._score()
        return self._scored

    def _score(self) -> Tensor:
        """The half of the backward pass that forms gradients of activations, and none of parameters."""
        if not self._seen or self._graph is None:
            raise CaptureError("no module was called through its hooks: was another model trained?")
        if hidden := self._hidden - {call.layer.path for call, _ in self._seen}:
            raise CaptureError(
                f"{', '.join(sorted(hidden))}: called without gradients only; with activation checkpointing use "
                "use_reentrant=False, or GhostContributions"
            )
        if self._scaler is not None and self._scaler.is_enabled():
            self._scale = float(self._scaler.scale(torch.ones((), device=self._graph.device)))
        gradients = torch.autograd.grad(
            self._graph.sum() * self._scale, [edge for _, edge in self._seen], allow_unused=True
        )
        self._graph = None
        total = None
        for (call, _), g in zip(self._seen, gradients, strict=True):
            if g is not None:
                assert call.x is not None
                call.g = g.reshape(call.output)
                part = self._contract(call, call.x, call.g)
                total = part if total is None else total + part.to(total)
        assert total is not None, "losses depend on a module, or they would have no gradient"
        self._seen = [(call, edge) for call, edge in self._seen if call.g is not None]
        total = total / self._scale
        return torch.where(total.isfinite(), total, torch.nan)

    def _accumulate(self, call: Call, factors: Tensor) -> None:
        assert call.x is not None
        assert call.g is not None
        x = call.x if call.shape is None else call.x.expand(call.shape)
        self._contracting = True
        try:
            with torch.no_grad(), torch.autocast(call.g.device.type, enabled=False):
                for parameter, gradient in call.layer.gradients(x, call.g, factors):
                    gradient = gradient.to(parameter.dtype)
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        finally:
            self._contracting = False

    def _wanted(self) -> bool:
        return self._losses is None  # a pass that is recomputed has been seen

    def _enter(self, call: Call, x: Tensor) -> Tensor:
        call.x = x.detach()
        return x

    def _leave(self, call: Call, y: Tensor) -> None:
        self._seen.append((call, get_gradient_edge(y)))


class OnePassContributions(Contributions[OnePassCapture]):
    """Contributions before the weights are needed, and no second backward pass: for about 1.4 plain steps.

    The backward pass is cut in two: gradients of activations give the contributions; then the weights that the service
    answers, in the same step, give the gradients of the parameters. Zero-weight examples are scored too. Keeps the
    gradient of every module's output until `backward`. Activation checkpointing saves no memory then, and hooks on
    parameters do not run, which is why models in DistributedDataParallel are refused.

    Example:
        >>> contributions = OnePassContributions(model, direction)
        >>> for ids, batch in loader:
        ...     with contributions.capture(ids) as capture:
        ...         capture.losses(batch)
        ...         capture.backward(client.step(ids, **capture.fields()).weights)
        ...     optimizer.step()
        ...     optimizer.zero_grad()

    Args:
        model: the model in training.
        direction: where learning should go.
        scaler: the GradScaler of the job: `.grad` is scaled as after `scaler.scale(loss).backward()`.
        shared: as in `GhostContributions`.
        also: as in `GhostContributions`.

    Raises:
        UnsupportedModuleError: the model has trainable parameters in other modules, or is compiled, replicated or
            sharded.
    """

    def __init__(
        self,
        model: nn.Module,
        direction: TargetDirection,
        *,
        scaler: GradScaler | None = None,
        shared: Collection[str] = (),
        also: Kinds = (),
    ) -> None:
        super().__init__(model, direction)
        self._scaler = scaler
        self._also = also
        self._rows = Rows(shared)
        self._refreshed()

    def _refreshed(self) -> None:
        check_eager(self.model)
        check_whole(self.model)
        if replicated := replicated_modules(self.model):
            raise UnsupportedModuleError(
                replicated,
                why="gradients that are formed here do not pass the hooks that reduce them",
                instead="use GhostContributions, or the model inside and reduce `.grad` yourself",
            )
        self._layers = layers_of(self.model, also=self._also)

    def _capture(self, ids: ArrayLike) -> OnePassCapture:
        return OnePassCapture(self.direction, ids, layers=self._layers, rows=self._rows, scaler=self._scaler)
