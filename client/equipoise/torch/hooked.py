"""Captures that see every call of the modules that account for the parameters."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from equipoise.torch.calls import Observed, Recorder, Whole
from equipoise.torch.capture import Capture
from equipoise.torch.coverage import Coverage
from equipoise.torch.direction import TargetDirection
from equipoise.torch.errors import CaptureError
from equipoise.torch.graph import Node
from equipoise.torch.layers import Direction, Layer
from equipoise.torch.plan import Settled
from equipoise.torch.rows import Rows, precise


class HookedCapture(Capture):
    """Hooks on one batch; gone when the `with` block ends. No output and no gradient is altered by them."""

    def __init__(self, direction: TargetDirection, ids: ArrayLike | None, *, coverage: Coverage) -> None:
        super().__init__(direction, ids)
        self._coverage = coverage
        self._recorder: Recorder | None = None
        self._settled: Settled | None = None
        self._contracting = False

    def __enter__(self) -> Self:
        super().__enter__()
        self._recorder = self._coverage.recorder(len(self.ids) if self.identified else None, self)
        self._recorder.attach()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self._recorder is not None:
            self._recorder.detach()

    def watch(self, losses: Tensor) -> Tensor:
        """As in `Capture`.

        Raises:
            UnsupportedModuleError: some parameter cannot be accounted for; the message says by which.
        """
        losses = super().watch(losses)
        assert self._recorder is not None
        self._settled = self._coverage.settle(self._recorder, losses, len(self.ids), self._direction.vectors)
        self._recorder.forget()
        if self._settled is not None:
            self.expect(self._settled.sums, coarse=self._coverage.coarse)
        self._multiplier = None  # the passes of a survey are no training
        return losses

    def wants(self) -> bool:
        """Whether a forward pass of now is the captured one: until its losses are known, or when it is recomputed."""
        return not self._contracting and (self._losses is None or torch._C._current_graph_task_id() != -1)

    def enter(self, call: Observed, x: Tensor) -> Tensor:
        """A module with a formula is called with x; returns what it gets instead, equal in value."""
        call.x = x
        return x

    def leave(self, call: Observed, y: Tensor) -> None:
        """A module with a formula has given y."""

    def _unknown(self) -> Tensor:
        """The contributions of a step that cannot be seen through: NaN."""
        assert self._losses is not None
        return torch.full_like(self._losses, torch.nan, dtype=torch.float32).expand(len(self._along), -1)

    def _claimed(self, module: nn.Module, vectors: Direction) -> Direction:
        """The part of a direction in the parameters of a module that its calls account for."""
        assert self._settled is not None
        return {p: vectors[p] for p in self._settled.plan.claims.get(module, ()) if p in vectors}

    def _contract(self, call: Observed, x: Tensor, g: Tensor, *, copied: bool) -> Tensor:
        """Contributions of one call of a module with a formula along each direction: [D, B].

        Args:
            call: the call.
            x: its input.
            g: gradient of its output.
            copied: whether all examples share the output, and g has a copy of it for each.
        """
        claimed = [self._claimed(call.layer.module, vectors) for vectors in self._along]
        if not any(claimed):
            return g.new_zeros(len(claimed), len(self.ids), dtype=torch.float32)
        with self._contraction(g):
            x, g = self._aligned(call, x, g, copied=copied)
            rows = self._rows(call, g)
            return torch.stack([_contracted(call.layer, x, g, direction, rows) for direction in claimed])

    def _contract_block(self, call: Whole) -> Tensor:
        """Contributions of one call of a module taken as a whole along each direction: [D, B]."""
        assert self._settled is not None
        block, layout = self._settled.plan.blocks[call.module], self._settled.layout
        with self._contraction(next(iter(call.g.values()))):
            return torch.stack([block.contract(call, vectors, layout) for vectors in self._along])

    def _aligned(self, call: Observed, x: Tensor, g: Tensor, *, copied: bool) -> tuple[Tensor, Tensor]:
        """Input and gradient of the output with rows for each example."""
        if not copied:
            return x, g.reshape(call.shape)
        assert self._settled is not None
        copies, alone = self._settled.layout.copies, call.shape[0] == 1
        x = x.expand(copies, *(x.shape[1:] if alone and x.shape[0] == 1 else x.shape))
        return x, g.reshape(copies, *(call.shape[1:] if alone else call.shape))

    def _rows(self, call: Observed, g: Tensor) -> Rows:
        assert self._settled is not None
        rows = self._settled.layout.rows(tuple(g.shape))
        if rows is None:
            raise CaptureError(
                f"{call.layer.path}: its rows cannot be told apart under activation checkpointing with "
                "use_reentrant=True; use use_reentrant=False"
            )
        return rows

    @contextmanager
    def _contraction(self, g: Tensor) -> Iterator[None]:
        """Computations with a layer: a layer may call its module, whose hooks must not take that for a forward pass."""
        self._contracting = True
        try:
            with torch.no_grad(), torch.autocast(g.device.type, enabled=False):
                yield
        finally:
            self._contracting = False


def _contracted(layer: Layer, x: Tensor, g: Tensor, direction: Direction, rows: Rows) -> Tensor:
    """Contributions of one call along one direction: [B]."""
    if not direction:
        return g.new_zeros(rows.count, dtype=precise(g.dtype))
    if g.dtype.itemsize >= 4:
        return layer.contract(x, g, direction, rows)
    # A direction is small, and would vanish in half precision.
    size = torch.stack([vector.abs().max() for vector in direction.values()]).max().clamp(min=1e-30)
    return layer.contract(x, g, {p: vector / size for p, vector in direction.items()}, rows) * size


def sources(call: Observed, spread: list[Node]) -> list[tuple[Node, int]]:
    """Where the gradients of a call arrive: at its output, or where the output is given to each example."""
    return [(node, 0) for node in spread] if spread else [call.source[:2]]
