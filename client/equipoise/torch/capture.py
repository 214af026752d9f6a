"""One batch's statistics, taken while the model is trained on it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from equipoise.torch.direction import TargetDirection, checked_losses
from equipoise.torch.errors import CaptureError, ContributionsDifferError
from equipoise.torch.processes import unreduced
from equipoise.torch.quiet import RandomState, repeating
from equipoise.wire import StepFields


class Capture(ABC):
    """Statistics of one batch, or micro-batch: a context manager around its forward and backward pass.

    Args:
        direction: where learning should go.
        ids: the example of each row, [B].
    """

    def __init__(self, direction: TargetDirection, ids: ArrayLike) -> None:
        self.ids = _integers(ids)
        self._direction = direction
        self._losses: Tensor | None = None
        self._target_loss: Tensor | None = None
        self._guard_loss: Tensor | None = None
        self._open = False

    def losses(self, batch: Any) -> Tensor:
        """The forward pass: the loss of each example, [B], from the `loss_fn` of the direction.

        Weigh, average and scale the losses as you like; zero weights too.
        """
        return self.watch(self._direction.losses(batch))

    def watch(self, losses: Tensor) -> Tensor:
        """Takes the loss of each example, [B], from a forward pass of yours, and returns it: go on with that.

        Raises:
            CaptureError: outside the `with` block, for the second time, or without gradients.
            DirectionError: there is not one loss per example.
        """
        if not self._open:
            raise CaptureError("the forward pass belongs into `with contributions.capture(ids) as capture:`")
        if self._losses is not None:
            raise CaptureError("a capture takes one forward pass: make one capture for each micro-batch")
        if not losses.requires_grad:
            raise CaptureError("losses have no gradient: is the forward pass under torch.no_grad, or the model frozen?")
        self._losses = checked_losses(losses, len(self.ids)).detach()
        return losses

    @property
    def contributions(self) -> Tensor:
        """∇L_target·∇l_n of the unweighted loss of each example, on the device: [B]; NaN where it is not known.

        Raises:
            CaptureError: it is not known yet.
        """
        if self._losses is None:
            raise CaptureError("no forward pass was captured: use `capture.losses(batch)` or `capture.watch(losses)`")
        return self._contributions()

    def fields(self) -> StepFields:
        """What `PolicyClient.step` and `submit` take: `client.step(ids, **capture.fields())`.

        Contributions, losses and scored; target and guard loss when the direction was refreshed for this capture.
        """
        contributions = _numpy(self.contributions)
        assert self._losses is not None
        losses = _numpy(self._losses)
        fields = StepFields(
            contributions=contributions,
            losses=losses,
            scored=np.isfinite(contributions) & np.isfinite(losses),
        )
        if self._target_loss is not None:
            fields["target_loss"] = float(self._target_loss)
        if self._guard_loss is not None:
            fields["guard_loss"] = float(self._guard_loss)
        return fields

    @abstractmethod
    def _contributions(self) -> Tensor: ...

    def __enter__(self) -> Self:
        if self._losses is not None:
            raise CaptureError("a capture is used once: make one for each batch")
        self._open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False

    def note_losses(self) -> None:
        """The direction was refreshed for this capture, which carries the losses that were measured then."""
        self._target_loss, self._guard_loss = self._direction.target_loss, self._direction.guard_loss


CaptureT = TypeVar("CaptureT", bound=Capture)


class Contributions(ABC, Generic[CaptureT]):
    """A way to get the contribution of each example of a batch while a model is trained on it.

    Args:
        model: the model in training.
        direction: where learning should go.
    """

    def __init__(self, model: nn.Module, direction: TargetDirection) -> None:
        self.model = model
        self.direction = direction

    def capture(self, ids: ArrayLike) -> CaptureT:
        """A capture for one batch, to be used as `with contributions.capture(ids) as capture:`.

        Refreshes the direction first when it is due.

        Args:
            ids: the example of each row: integers [B], a tensor, an array or a list.
        """
        refreshed = self.direction.advance()
        if refreshed:
            self._refreshed()
        capture = self._capture(ids)
        if refreshed:
            capture.note_losses()
        return capture

    def verify(self, batch: Any, *, examples: int = 4, tolerance: float = 0.05) -> float:
        """Compares with the gradients of some examples, each by a backward pass of its own; changes nothing.

        Worth its price once for a new model: it finds what no method can see, such as modules that mix examples, or
        tensors whose first dimension is not the examples.

        Args:
            batch: a batch of the training data.
            examples: how many of its examples, from the first on.
            tolerance: largest relative error ‖c − c*‖/‖c*‖ that passes; rounding to bfloat16 needs some room.

        Returns:
            The relative error.

        Raises:
            ContributionsDifferError: it is larger.
        """
        if not self.direction.vectors:
            self.direction.refresh()
        random = RandomState(self.model)
        with repeating(self.model, random):
            losses = self.direction.quiet_losses(batch)
            expected = per_example(losses[:examples], self.direction.vectors)
        with unreduced(self.model), repeating(self.model, random), self._capture(range(len(losses))) as capture:
            losses = capture.losses(batch)
            if losses.requires_grad:
                torch.autograd.grad(losses.sum(), list(self.direction.vectors), allow_unused=True)
            found = capture.contributions[:examples].double()
        error = float((found - expected).norm() / expected.norm())
        if not error <= tolerance:
            raise ContributionsDifferError(
                f"{type(self).__name__} is off by {error:.3g} of the contributions by per-example gradients "
                f"({found.tolist()} instead of {expected.tolist()}): does a module mix examples, is the first "
                "dimension of every module the examples, are parameters used outside of their modules?"
            )
        return error

    @abstractmethod
    def _capture(self, ids: ArrayLike) -> CaptureT: ...

    def _refreshed(self) -> None:
        """The direction has been refreshed: which parameters are trainable may have changed."""


def join(*captures: Capture) -> tuple[NDArray[np.uint64], StepFields]:
    """Ids and fields of several captures as one step: the micro-batches of an accumulated gradient.

    Example:
        >>> ids, fields = join(*captures)
        >>> weights = client.step(ids, **fields).weights
    """
    if not captures:
        raise CaptureError("there is no capture to join")
    parts = [capture.fields() for capture in captures]
    joined: StepFields = {}
    for name in ("contributions", "gradient_sketches", "losses", "scored"):
        if name in parts[0]:
            joined[name] = np.concatenate([np.asarray(part[name]) for part in parts])
    if "target_sketch" in parts[0]:
        joined["target_sketch"] = target = np.asarray(parts[0]["target_sketch"])
        if any(not np.array_equal(np.asarray(part["target_sketch"]), target) for part in parts):
            raise CaptureError("these captures have sketches of several target directions: send each as its own step")
    for part in parts:  # of two refreshes the newer counts
        if "target_loss" in part:
            joined["target_loss"] = part["target_loss"]
        if "guard_loss" in part:
            joined["guard_loss"] = part["guard_loss"]
    return np.concatenate([capture.ids for capture in captures]), joined


def per_example(losses: Tensor, vectors: Mapping[nn.Parameter, Tensor]) -> Tensor:
    """Contributions by their definition, one backward pass for each loss: float64 [B]."""
    parameters = list(vectors)
    contributions = []
    for loss in losses:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        pairs = zip(gradients, parameters, strict=True)
        contributions.append(sum((g.double() * vectors[p]).sum() for g, p in pairs if g is not None))
    return torch.stack([torch.as_tensor(value, dtype=torch.float64) for value in contributions])


def _integers(ids: ArrayLike) -> NDArray[np.uint64]:
    array = ids.detach().cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
        raise CaptureError(
            f"ids of shape {array.shape} and type {array.dtype}: must be one integer for each example of the batch"
        )
    return array.astype(np.uint64)


def _numpy(values: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = values.to("cpu", torch.float32).numpy()
    return array
