"""Contributions by sketches: the trainer projects the gradients of examples and target, the server multiplies."""

from collections.abc import Collection

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from equipoise.torch.calls import Observed
from equipoise.torch.capture import Contributions, Sums, _numpy
from equipoise.torch.coverage import Coverage
from equipoise.torch.direction import TargetDirection
from equipoise.torch.errors import UnsupportedModuleError
from equipoise.torch.ghost import GhostCapture
from equipoise.torch.layers import Direction
from equipoise.torch.projections import Projection, check_formulas, projections_of
from equipoise.wire import StepFields


class SketchCapture(GhostCapture):
    """One forward and backward pass; the sketches are known after the backward pass."""

    def __init__(
        self,
        direction: TargetDirection,
        ids: ArrayLike | None,
        *,
        coverage: Coverage,
        projections: dict[nn.Module, Projection],
        targets: dict[nn.Module, Tensor],
        plain: dict[nn.Module, Tensor],
    ) -> None:
        super().__init__(direction, ids, coverage=coverage)
        self._projections = projections
        self._targets = targets
        self._plain = plain
        self._sketched: dict[nn.Module, Tensor] = {}

    @property
    def target_sketch(self) -> Tensor:
        """Sketch of the target gradient, as it was at the start of the capture: float32 [K]."""
        return torch.cat(list(self._targets.values()))

    @property
    def sketches(self) -> Tensor:
        """Sketches of the gradients of the unweighted loss of each example: float32 [B, K]; NaN where not known.

        Raises:
            CaptureError: they are not known yet.
        """
        known = self.contributions.isfinite()
        assert self._scale is not None
        empty = torch.zeros(len(self.ids), 1, device=known.device)
        parts = [self._sketched.get(module, empty.expand(-1, len(part))) for module, part in self._targets.items()]
        scale = torch.where(known, self._scale, 1).float()[:, None]
        return torch.where(known[:, None], torch.cat(parts, dim=1) / scale, torch.nan)

    def fields(self) -> StepFields:
        """What `PolicyClient.step` and `submit` take: sketches in place of contributions."""
        fields = super().fields()
        del fields["contributions"]
        fields["gradient_sketches"] = _numpy(self.sketches)
        fields["target_sketch"] = _numpy(self.target_sketch)
        return fields

    def expect(self, sums: Sums, *, coarse: bool) -> None:
        """Nothing: sketches are estimates, which add up to no gradient."""

    def _watched(self) -> bool:
        return False

    def _contract(self, call: Observed, x: Tensor, g: Tensor, *, copied: bool) -> Tensor:
        """What one call adds to the estimated contributions, [D, B]; its sketches are kept."""
        module, count = call.layer.module, len(self.ids)
        x, g = self._aligned(call, x, g, copied=copied)
        if self._rows(call, g).owners is not None:
            raise UnsupportedModuleError(
                [(call.layer.path, module)],
                why="sketches are made of batches whose first dimension holds the examples",
                instead="use GhostContributions(model, direction) for packed and paired examples",
            )
        with self._contraction(g):
            rows = self._projections[module].rows(x, g, count)
            self._sketched[module] = self._sketched[module] + rows if module in self._sketched else rows
            targets = (self._targets, self._plain)[: len(self._along)]
            return torch.stack([rows @ target[module] for target in targets])


class SketchContributions(Contributions[SketchCapture]):
    """Sketches of gradients instead of contributions: random projections made on the training backward pass.

    Each layer's input and output gradient are projected with fixed random matrices, so that the gradient of an
    example becomes some hundred numbers per layer; the server multiplies them with the same sketch of the target
    direction. In mean over the projections that is the contribution, exactly; for one draw it is an estimate, the
    better the wider (measured on a small GPT, width 8, 16, 32: Spearman 0.81, 0.88, 0.95 with the exact
    contributions). Its error goes with the gradients' norms, so that it is poor while they are hardly aligned with
    the target's: on an untrained Llama 0.09, 0.22, 0.36. Where it can be used, `GhostContributions` is better: exact,
    and one number per example. Sketches leave the target to whoever makes `target_sketch`, which may be another
    process with the same seed.

    Example:
        >>> contributions = SketchContributions(model, direction, width=16)
        >>> for ids, batch in loader:
        ...     with contributions.capture(ids) as capture:
        ...         losses = capture.losses(batch)
        ...         weighted_mean(losses, client.weights(ids)).backward()
        ...     client.submit(ids, **capture.fields())

    Args:
        model: the model in training.
        direction: where learning should go.
        width: k, rows of each projection; a matrix is sketched by k·k numbers. The wire holds 65,536 per example.
        seed: of the projections; processes of one run, and runs that are resumed, need the same.
        shared: as for `GhostContributions`.

    Raises:
        UnsupportedModuleError: the model has trainable parameters outside of Linear, Embedding, LayerNorm, RMSNorm and
            transformers' Conv1D, is compiled or sharded.
        ValueError: the width is not positive, or the seed not in [0, 2^31).
    """

    tolerance = None
    sees_noise = False

    def __init__(
        self,
        model: nn.Module,
        direction: TargetDirection,
        *,
        width: int = 16,
        seed: int = 0,
        shared: Collection[str] = (),
    ) -> None:
        super().__init__(model, direction)
        if width < 1:
            raise ValueError(f"width = {width}: must be at least 1")
        if not 0 <= seed < 2**31:
            raise ValueError(f"seed = {seed}: must be in [0, 2^31)")
        self._width, self._seed = width, seed
        self.coverage = Coverage(model, shared=shared, whole=False)
        self._targets: dict[nn.Module, Tensor] = {}
        self._plain: dict[nn.Module, Tensor] = {}
        self._sketched: object = None
        self._plain_sketched: object = None
        self._trainable: list[int] = []
        self._projections: dict[nn.Module, Projection] = {}
        self._refreshed()

    def verify(self, batch: object, *, examples: int = 4, tolerance: float = 1.0) -> float:
        """As in `Contributions`; a sketch is an estimate, so that much more than 0 is to be expected."""
        return super().verify(batch, examples=examples, tolerance=tolerance)

    def _refreshed(self) -> None:
        self.coverage.refresh()
        trainable = [id(parameter) for parameter in self.coverage.trainable]
        if trainable != self._trainable:
            check_formulas(self.model, self.coverage.layers)
            self._trainable = trainable
            self._projections = projections_of(self.coverage.layers, width=self._width, seed=self._seed)

    def _capture(self, ids: ArrayLike | None) -> SketchCapture:
        vectors, plain = self.direction.vectors, self.direction.plain
        if self._plain_sketched is not plain:
            self._plain_sketched, self._plain = plain, self._sketch_of(plain)
        if self._sketched is not vectors:
            self._sketched, self._targets = vectors, self._plain if vectors is plain else self._sketch_of(vectors)
        return SketchCapture(
            self.direction,
            ids,
            coverage=self.coverage,
            projections=self._projections,
            targets=self._targets,
            plain=self._plain,
        )

    @torch.no_grad()
    def _sketch_of(self, vectors: Direction) -> dict[nn.Module, Tensor]:
        """A sketch by module.

        By linearity that of the target is the mean of its examples' sketches; and where two layers share a weight, each
        needs the sketch of the sum.
        """
        return {module: projection.vector(vectors) for module, projection in self._projections.items()}
