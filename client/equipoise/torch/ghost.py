"""Contributions from the training backward pass itself: `ghost`, and its last-layer variant."""

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from equipoise.torch.calls import Observed, Whole
from equipoise.torch.capture import Contributions
from equipoise.torch.coverage import Coverage
from equipoise.torch.direction import TargetDirection
from equipoise.torch.errors import CaptureError, UnsupportedModuleError
from equipoise.torch.graph import Node
from equipoise.torch.hooked import HookedCapture, sources
from equipoise.torch.identity import Identity
from equipoise.torch.kinds import Kinds


class GhostCapture(HookedCapture):
    """One forward and backward pass; the contributions are known after the backward pass."""

    def __init__(self, direction: TargetDirection, ids: ArrayLike | None, *, coverage: Coverage) -> None:
        super().__init__(direction, ids, coverage=coverage)
        self._sum: Tensor | None = None
        self._scale: Tensor | None = None
        self._probing = True
        self._identity: Identity | None = None
        self._parts: dict[nn.Module, Tensor] = {}

    def watch(self, losses: Tensor) -> Tensor:
        """As in `Capture`; the backward pass must go through the losses that are returned."""
        self._let_go_while_probing()
        losses = super().watch(losses)
        self._probing = False
        # The gradient that arrives here is what each example's loss was multiplied by: weight, mean over the batch,
        # accumulation, the scale of a GradScaler, all at once and exactly.
        losses.register_hook(self._see_scale)  # type: ignore[no-untyped-call]
        if self._settled is not None:
            for call, spread in self._settled.observed:
                self._listen(call, spread)
            for whole in self._settled.wholes:
                self._listen_whole(whole)
            if self._watched():
                self._identity = Identity(self._direction.vectors, self._coverage.trainable)
        return losses

    def _watched(self) -> bool:
        """Whether contributions and gradient are compared on this step."""
        new = self._settled is not None and self._settled.surveyed
        return (self._looks_closely or new) and not self._coverage.partial

    def __exit__(self, *error: Any) -> None:
        if self._identity is not None:
            self._identity.detach()
        super().__exit__(*error)

    def enter(self, call: Observed, x: Tensor) -> Tensor:
        """As in `HookedCapture`."""
        if x.requires_grad:
            kept: Tensor = _Keep.apply(x)  # type: ignore[no-untyped-call]
            call.keeper = kept.grad_fn
        else:
            call.x = x
        return x

    def leave(self, call: Observed, y: Tensor) -> None:
        """As in `HookedCapture`; after the forward pass, of what is recomputed and differentiated at once."""
        if self._settled is not None:
            self._listen(call, [])

    def _contributions(self) -> Tensor:
        if self._scale is None:
            raise CaptureError(
                "no backward pass was captured: it belongs into the `with` block, after the forward pass"
            )
        if self._settled is None:
            return self._unknown()
        if self._sum is None:
            raise CaptureError("the backward pass did not go through the whole model: call `.backward()`")
        # What is partly computed in float32 is no more precise than that.
        weighted = self._sum.float() if self._coverage.single else self._sum
        if self._identity is not None and not self._identity.checked:
            self._identity.check(weighted[0], self._parts, self._coverage)
        known = self._scale != 0
        contributions = weighted / torch.where(known, self._scale, 1).to(weighted)
        return torch.where(known & contributions.isfinite(), contributions, torch.nan)

    def _see_scale(self, scale: Tensor) -> None:
        if not self._open:
            return
        self._scale = scale.detach() if self._scale is None else self._scale + scale.detach()
        if self._settled is not None and self._settled.wholes:
            # At the end of this backward pass, when all gradients are there and the parameters are still the same.
            torch.autograd.Variable._execution_engine.queue_callback(self._contract_wholes)

    def _let_go_while_probing(self) -> None:
        """Takes back what checkpoints recompute for us in backward passes before the one of the training."""

        def take(_gradients: Any, keeper: Any) -> None:
            if self._probing:
                _ = keeper.saved_tensors

        if self._coverage.plan is None or self._to_verify is not None:
            for call in () if self._recorder is None else self._recorder.observed:
                if call.keeper is not None:
                    call.source[0].register_prehook(partial(take, keeper=call.keeper))

    def _listen(self, call: Observed, spread: list[Node]) -> None:
        def see(gradients: Any, number: int) -> None:
            g = gradients[number]
            if not self._open or g is None:
                return
            x = call.x if call.keeper is None else call.keeper.saved_tensors[0]
            if x is None:
                raise CaptureError(f"{call.layer.path}: a second backward pass needs retain_graph=True in the first")
            self._take(call.layer.module, self._contract(call, x, g.detach(), copied=bool(spread)))
            if len(ends) == 1 and not _keeps_graph():
                call.keeper = None  # as autograd lets go of what it saved

        ends = sources(call, spread)
        for node, number in ends:
            node.register_prehook(partial(see, number=number))

    def _listen_whole(self, call: Whole) -> None:
        def see(gradients: Any, place: int, number: int) -> None:
            g = gradients[number]
            if self._open and g is not None:
                g = g.detach().reshape(call.sources[place][2])
                call.g[place] = call.g[place] + g if place in call.g else g

        assert self._settled is not None
        for place in self._settled.plan.blocks[call.module].places & call.sources.keys():
            node, number, _ = call.sources[place]
            node.register_prehook(partial(see, place=place, number=number))

    def _contract_wholes(self) -> None:
        if self._settled is None:
            return
        for call in self._settled.wholes:
            if call.g:
                part = self._contract_block(call)
                call.g.clear()
                self._take(call.module, part)

    def _take(self, module: nn.Module, part: Tensor) -> None:
        self._sum = part if self._sum is None else self._sum + part.to(self._sum)
        if self._identity is not None:
            total = part[0].double().sum()
            self._parts[module] = self._parts[module] + total if module in self._parts else total


class GhostContributions(Contributions[GhostCapture]):
    """Contributions from hooks on the training backward pass: exact, for about a third of a step more.

    Each module's input and output gradient are contracted with the direction as they appear, so that no gradient of an
    example is ever formed and no memory beyond one layer's activations is taken. The contributions of a step are known
    after its backward pass: the weights that the service answers are for the next visit of these examples. Rows that
    were trained with weight 0 have no gradient to see: their contributions are NaN and not scored.

    Works with gradient accumulation (one capture for each micro-batch), autocast and GradScaler, activation
    checkpointing, DistributedDataParallel, any attention kernel, tied weights, frozen parameters, adapters, experts,
    packed rows and padding-free batches, pairs, and with losses averaged over the tokens of an example, padding or not.
    The first step is surveyed, at two more backward passes; see `equipoise.torch.coverage`. Modules without a formula
    are called once more. Of a step that is unlike all before nothing is known, and for some steps from then on one that
    is unlike them is surveyed itself.

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
        shared: paths of modules whose output all examples share, as positions: they are found out but where activations
            are checkpointed with `use_reentrant=True`.
        also: types of modules that are differentiated by forward mode as a whole, with all that is in them.

    Attributes:
        coverage: who accounts for which parameter, and counts of what was watched.

    Raises:
        UnsupportedModuleError: the model is compiled or sharded; a capture raises it where a parameter cannot be
            accounted for.
    """

    def __init__(
        self, model: nn.Module, direction: TargetDirection, *, shared: Collection[str] = (), also: Kinds = ()
    ) -> None:
        super().__init__(model, direction)
        self.coverage = Coverage(model, shared=shared, also=also)

    def _refreshed(self) -> None:
        self.coverage.refresh()

    def _capture(self, ids: ArrayLike | None) -> GhostCapture:
        return GhostCapture(self.direction, ids, coverage=self.coverage)


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

    tolerance = None
    sees_noise = False

    def __init__(self, model: nn.Module, direction: TargetDirection, *, layer: str | None = None) -> None:
        path = _last_linear(model) if layer is None else layer
        module = model.get_submodule(path)
        Contributions.__init__(self, model, direction)
        self.coverage = Coverage(model, part=(path, module), whole=False)
        if module not in self.coverage.layers:
            frozen = not any(p.requires_grad for p in module.parameters(recurse=False))
            why = "has no trainable parameter" if frozen else "is no layer whose formula is known"
            raise UnsupportedModuleError([(path, module)], why=why, instead="name another layer")

    def verify(self, batch: Any, *, examples: int = 4, tolerance: float = 1.0) -> float:
        """As in `Contributions`; one layer's share is an approximation, so that much more than 0 is to be expected."""
        return super().verify(batch, examples=examples, tolerance=tolerance)


def _last_linear(model: nn.Module) -> str:
    paths: list[str] = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not paths:
        raise UnsupportedModuleError([("", model)], why="has no nn.Linear", instead="name a layer")
    return paths[-1]


class _Keep(torch.autograd.Function):
    """Keeps a tensor beside the graph, not in it: nothing of a training's backward pass is ordered otherwise.

    What a function saves is recomputed under activation checkpointing and offloaded as everything else; a reference of
    our own would defeat both.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return None


def _keeps_graph() -> bool:
    """Whether the backward pass under way leaves its graph for another one."""
    told = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)  # not by torch 2.4
    return told is None or bool(told())
