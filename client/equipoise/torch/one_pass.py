"""Score and train in one step: contributions first, then the exact gradient under the weights they earn."""

from collections.abc import Collection

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.autograd.graph import GradientEdge

from equipoise.torch.calls import Observed
from equipoise.torch.capture import Contributions
from equipoise.torch.coverage import Coverage
from equipoise.torch.direction import TargetDirection
from equipoise.torch.errors import CaptureError, UnsupportedModuleError
from equipoise.torch.hooked import HookedCapture, sources
from equipoise.torch.kinds import Kinds
from equipoise.torch.losses import as_weights
from equipoise.torch.processes import replicated_modules


class OnePassCapture(HookedCapture):
    """A forward pass whose backward pass is made here, in two halves."""

    def __init__(
        self, direction: TargetDirection, ids: ArrayLike | None, *, coverage: Coverage, scaler: GradScaler | None
    ) -> None:
        super().__init__(direction, ids, coverage=coverage)
        self._scaler = scaler
        self._graph: Tensor | None = None
        self._seen: list[tuple[Observed, Tensor, bool]] = []
        self._scored: Tensor | None = None
        self._scale = 1.0
        self._done = False

    def watch(self, losses: Tensor) -> Tensor:
        """As in `Capture`; the losses that are returned cannot be differentiated: `backward` does it."""
        self._graph = super().watch(losses)
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
        if self._done:
            raise CaptureError("a capture makes one backward pass")
        assert self._losses is not None
        factors = as_weights(weights, self._losses) / len(self.ids)
        self._done = True
        self._multiplier = factors.double().mean() * self._scale
        self._accumulate_rest(factors)
        while self._seen:
            self._accumulate(*self._seen.pop(), factors)

    def _listen_to_multiplier(self, losses: Tensor) -> None:
        """`backward` knows it."""

    def _let_go_of_signs(self) -> None:
        """Contributions may be asked for later."""
        if self._scored is not None:
            super()._let_go_of_signs()

    def wants(self) -> bool:
        """As in `HookedCapture`; a pass that is recomputed has been seen."""
        return not self._contracting and self._losses is None

    def enter(self, call: Observed, x: Tensor) -> Tensor:
        """As in `HookedCapture`."""
        call.x = x.detach()
        return x

    def _contributions(self) -> Tensor:
        if self._scored is None:
            self._scored = self._score()
        return self._scored

    def _score(self) -> Tensor:
        """The half of the backward pass that forms gradients of activations, and none of parameters."""
        assert self._graph is not None
        assert self._recorder is not None
        seen = {call.layer.module for call, _ in self._settled.observed} if self._settled is not None else set()
        if hidden := [
            layer.path for module, layer in self._coverage.layers.items() if module in self._recorder.hidden - seen
        ]:
            raise CaptureError(
                f"{', '.join(sorted(hidden))}: called without gradients only; with activation checkpointing use "
                "use_reentrant=False, or GhostContributions"
            )
        if self._scaler is not None and self._scaler.is_enabled():
            self._scale = float(self._scaler.scale(torch.ones((), device=self._graph.device)))
        settled = self._settled
        if settled is None:
            return self._unknown()
        places = [
            (call, bool(spread), GradientEdge(*source))
            for call, spread in settled.observed
            for source in sources(call, spread)
        ]
        assert self._settled is not None
        outputs = [
            (whole, place, GradientEdge(*whole.sources[place][:2]))
            for whole in settled.wholes
            for place in self._settled.plan.blocks[whole.module].places & whole.sources.keys()
        ]
        edges = [edge for _, _, edge in (*places, *outputs)]
        gradients = torch.autograd.grad(
            self._graph.sum() * self._scale, edges, allow_unused=True, retain_graph=bool(self._rest())
        )
        total: Tensor | None = None
        for (call, copied, _), g in zip(places, gradients[: len(places)], strict=True):
            if g is not None:
                assert call.x is not None
                self._seen.append((call, g, copied))
                part = self._contract(call, call.x, g, copied=copied)
                total = part if total is None else total + part.to(total)
        for (whole, place, _), g in zip(outputs, gradients[len(places) :], strict=True):
            if g is not None:
                whole.g[place] = g
        for whole in settled.wholes:
            if whole.g:
                part = self._contract_block(whole)
                total = part if total is None else total + part.to(total)
        if total is None:
            raise CaptureError("no module was called through its hooks: was another model trained?")
        total = total / self._scale
        return torch.where(total.isfinite(), total, torch.nan)

    def _rest(self) -> list[nn.Parameter]:
        """The parameters whose gradients are left to autograd: those of modules taken as a whole."""
        if self._settled is None:
            return self._coverage.trainable
        return [p for block in self._settled.plan.blocks.values() for p in block.parameters.values()]

    def _accumulate_rest(self, factors: Tensor) -> None:
        if rest := self._rest():
            assert self._graph is not None
            weighted = (self._graph * factors).sum() * self._scale
            for parameter, gradient in zip(rest, torch.autograd.grad(weighted, rest, allow_unused=True), strict=True):
                if gradient is not None:
                    _add_gradient(parameter, gradient)
        self._graph = None

    def _accumulate(self, call: Observed, g: Tensor, copied: bool, factors: Tensor) -> None:
        assert call.x is not None
        assert self._settled is not None
        claims = self._settled.plan.claims[call.layer.module]
        x, g = self._aligned(call, call.x, g, copied=copied)
        with self._contraction(g):
            for parameter, gradient in call.layer.gradients(x, g, factors, self._rows(call, g)):
                if parameter in claims:
                    _add_gradient(parameter, gradient)


def _add_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    gradient = gradient.to(parameter.dtype)
    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


class OnePassContributions(Contributions[OnePassCapture]):
    """Contributions before the weights are needed, and no second backward pass: for about 1.4 plain steps.

    The backward pass is cut in two: gradients of activations give the contributions; then the weights that the service
    answers, in the same step, give the gradients of the parameters. Zero-weight examples are scored too. The
    gradients of modules without a formula take a second backward pass down to them. Keeps the gradient of every
    module's output until `backward`. Activation checkpointing saves no memory then, and hooks on
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

    Attributes:
        coverage: as in `GhostContributions`.

    Raises:
        UnsupportedModuleError: the model is compiled, replicated or sharded; a capture raises it where a parameter
            cannot be accounted for.
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
        self.coverage = Coverage(model, shared=shared, also=also)
        self._refreshed()

    def _refreshed(self) -> None:
        self.coverage.refresh()
        if replicated := replicated_modules(self.model):
            raise UnsupportedModuleError(
                replicated,
                why="gradients that are formed here do not pass the hooks that reduce them",
                instead="use GhostContributions, or the model inside and reduce `.grad` yourself",
            )

    def _capture(self, ids: ArrayLike | None) -> OnePassCapture:
        return OnePassCapture(self.direction, ids, coverage=self.coverage, scaler=self._scaler)
