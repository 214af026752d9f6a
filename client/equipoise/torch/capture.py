"""One batch's statistics, taken while the model is trained on it."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from time import perf_counter
from types import TracebackType
from typing import Any, ClassVar, Generic, Never, Self, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from equipoise.torch.direction import TargetDirection, checked_losses
from equipoise.torch.errors import CaptureError, ContributionsDifferError
from equipoise.torch.gradients import Noise
from equipoise.torch.identity import product_of
from equipoise.torch.processes import sharded_modules, unreduced
from equipoise.torch.quiet import ModelState, repeating
from equipoise.wire import StepFields

_log = logging.getLogger(__name__)

Sums: TypeAlias = list[tuple[Tensor, Tensor]]
"""Which examples, bool [B], and the sum of their contributions, from their gradient: float64."""

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
CAUSES = (
    "is there another loss in the backward pass than the ones given (an auxiliary loss, a penalty), or does a hook "
    "change gradients? Give all of the loss, example by example, or use JvpContributions(model, direction), in a "
    'trainer TrainingOptions(method="jvp")'
)

NO_LOSSES = "no forward pass was captured: use `capture.losses(batch)` or `capture.watch(losses)`"


class Capture(ABC):
    """Statistics of one batch, or micro-batch: a context manager around its forward and backward pass.

    Args:
        direction: where learning should go.
        ids: the example of each row, [B]; None: `identify` tells them, before the losses are known.
    """

    def __init__(self, direction: TargetDirection, ids: ArrayLike | None) -> None:
        self._ids = None if ids is None else _integers(ids)
        self._direction = direction
        self._ready = direction.ready
        self._losses: Tensor | None = None
        self._target_loss: Tensor | None = None
        self._guard_loss: Tensor | None = None
        self._open = False
        self._sums: Sums = []
        self._coarse = False
        self._to_verify: tuple[int, float] | None = None
        self._expected: Tensor | None = None
        self._seconds = 0.0
        self._noise: Noise | None = None
        self._trains = False
        self._multiplier: Tensor | None = None
        self.verified: bool | None = None
        self.refreshed = False
        self._looks_closely = self._looks_at_plain = False

    @property
    def ids(self) -> NDArray[np.uint64]:
        """The example of each row: uint64 [B].

        Raises:
            CaptureError: they are not known yet.
        """
        if self._ids is None:
            raise CaptureError("ids: are not known yet: give them to the capture, or call `identify(ids)`")
        return self._ids

    @property
    def identified(self) -> bool:
        """Whether the ids are known."""
        return self._ids is not None

    def identify(self, ids: ArrayLike) -> None:
        """Tells the example of each row, [B], of a capture that began without.

        Raises:
            CaptureError: they are no integers, or the losses are known already.
        """
        if self._losses is not None:
            raise CaptureError("ids: must be told before the losses")
        self._ids = _integers(ids)

    def losses(self, batch: Any) -> Tensor:
        """The forward pass: the loss of each example, [B], by the `losses` of the direction.

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
        if self._to_verify is not None:
            start = perf_counter()
            self._expected = self._by_definition(losses[: self._to_verify[0]])
            self._seconds = perf_counter() - start
        if self._trains:
            self._listen_to_multiplier(losses)
        return losses

    @property
    def contributions(self) -> Tensor:
        """∇L_target·∇l_n of the unweighted loss of each example, on the device: [B]; NaN where it is not known.

        Of a norm-matched direction the product with that, less what the noise of a step counts there; before it is
        known, plain ones that `fields` does not score.

        Raises:
            CaptureError: it is not known yet.
        """
        if self._losses is None:
            raise CaptureError(NO_LOSSES)
        found = self._contributions()
        contributions = found[0]
        self._check_sums(contributions)
        self._check_examples(contributions)
        if self._noise is None:
            return contributions
        return contributions - self._noise.factor.to(contributions) * found[-1].square()

    @property
    def plain_contributions(self) -> Tensor | None:
        """∇L_target·∇l_n, [B], of a capture for which a norm-matched direction was refreshed with a close look; None of
        others.

        It is what the Learning Law is about, and no more than a look at it: what is sent are `contributions`.
        """
        return self._contributions()[1] if self._looks_at_plain else None

    def fields(self) -> StepFields:
        """What `PolicyClient.step` and `submit` take: `client.step(ids, **capture.fields())`.

        Contributions, losses and scored; target and guard loss when the direction was refreshed for this capture.
        """
        contributions, fields = _numpy(self.contributions), self.loss_fields()
        fields["contributions"] = contributions
        fields["scored"] = np.isfinite(contributions) & np.asarray(fields["scored"]) & self._ready
        for name, loss in (("target_loss", self._target_loss), ("guard_loss", self._guard_loss)):
            if loss is not None and self._direction.is_usable(name, float(loss)):
                fields[name] = float(loss)  # type: ignore[literal-required]
        return fields

    def loss_fields(self) -> StepFields:
        """Losses and scored, known since the forward pass: what a rule takes that gives weights for them at once.

        Raises:
            CaptureError: they are not known yet.
        """
        if self._losses is None:
            raise CaptureError(NO_LOSSES)
        losses = _numpy(self._losses)
        return StepFields(losses=losses, scored=np.isfinite(losses))

    @property
    def _along(self) -> tuple[Mapping[nn.Parameter, Tensor], ...]:
        """What losses are differentiated along: the direction; V too, where plain contributions are looked at; last
        the random signs by which |∇l|² is seen."""
        direction = self._direction
        plain = (direction.plain,) if self._looks_at_plain else ()
        return (direction.vectors, *plain, *(() if self._noise is None else (self._noise.signs,)))

    @abstractmethod
    def _contributions(self) -> Tensor:
        """The product of each example's gradient with each of `_along`: [D, B]."""

    def __enter__(self) -> Self:
        if self._losses is not None:
            raise CaptureError("a capture is used once: make one for each batch")
        self._open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        if self._multiplier is not None:
            self._direction.note_backward(self._multiplier)
        self._let_go_of_signs()

    def trains(self, noise: Noise | None) -> None:
        """The model is trained by its backward pass, and what is seen of the noise of a step comes into it."""
        self._trains, self._noise = True, noise

    def note_losses(self) -> None:
        """The direction was refreshed for this capture, which carries the losses that were measured then."""
        self.refreshed, direction = True, self._direction
        self._looks_closely = direction.looks_closely
        self._looks_at_plain = (
            direction.looks_closely and direction.norm_matched and direction.vectors is not direction.plain
        )
        self._target_loss, self._guard_loss = direction.target_loss, direction.guard_loss

    def expect(self, sums: Sums, *, coarse: bool) -> None:
        """What the contributions of some examples add up to: compared when they are known.

        Args:
            sums: what they add up to.
            coarse: whether half precision is involved.
        """
        self._sums, self._coarse = sums, coarse

    def verify(self, examples: int, tolerance: float) -> None:
        """Has the first examples compared with their gradients, each by a backward pass of its own.

        Args:
            examples: how many, from the first on.
            tolerance: largest relative error ‖c − c*‖/‖c*‖ that passes.
        """
        self._to_verify = examples, tolerance

    def _let_go_of_signs(self) -> None:
        """They are as large as the model, and captures may be kept until a step's micro-batches are sent together."""
        if self._noise is not None:
            self._noise = replace(self._noise, signs={})

    def _listen_to_multiplier(self, losses: Tensor) -> None:
        """The gradient that arrives at the losses is what each was multiplied by; the training's pass is the last."""

        def see(gradient: Tensor) -> None:
            self._multiplier = gradient.detach().double().mean()

        losses.register_hook(see)  # type: ignore[no-untyped-call]

    def _by_definition(self, losses: Tensor) -> Tensor | None:
        try:
            return per_example(losses, self._direction.vectors)
        except RuntimeError as error:
            if "use_reentrant" not in str(error) and "donated buffers" not in str(error):
                raise
            _log.warning(
                "Contributions cannot be verified: only one backward pass goes through a model that is compiled, or "
                "whose activations are checkpointed with use_reentrant=True"
            )
            return None

    def _check_sums(self, contributions: Tensor) -> None:
        sums, self._sums = self._sums, []
        for chosen, expected in sums:
            parts = contributions[chosen].double()
            size = max(float(parts.abs().sum()), abs(float(expected)))
            gap = abs(float(parts.sum()) - float(expected))
            tolerance = 0.2 if self._coarse else TOLERANCE.get(contributions.dtype, 1e-2)
            if gap > tolerance * size:  # NaN, of examples with weight 0, passes
                raise ContributionsDifferError(
                    f"contributions of {int(chosen.sum())} examples add up to {float(parts.sum()):.6g}, their gradient "
                    f"says {float(expected):.6g}: {CAUSES}"
                )

    def _check_examples(self, contributions: Tensor) -> None:
        expected, self._expected = self._expected, None
        if expected is None or self._to_verify is None:
            return
        found = contributions[: len(expected)].double()
        known = found.isfinite() & expected.isfinite()
        self.verified = bool(known.any())
        if not self.verified:
            return
        error = float((found - expected)[known].norm() / expected[known].norm())
        if error > max(self._to_verify[1], 0.2 if self._coarse else 0.0):
            raise ContributionsDifferError(
                f"contributions are off by {error:.3g} of those by per-example gradients ({found.tolist()} instead of "
                f"{expected.tolist()}): {CAUSES}"
            )
        _log.info(
            "Contributions of %d examples were verified against gradients of their own: relative error %.2g, %.2g s, "
            "once",
            int(known.sum()),
            error,
            self._seconds,
        )


class LossCapture(Capture):
    """Losses alone, of a batch whose contributions are not measured: it costs nothing."""

    def _contributions(self) -> Never:
        raise CaptureError("contributions of this batch are not measured: the options of `WeightedSteps` leave it out")


CaptureT = TypeVar("CaptureT", bound=Capture)


class Contributions(ABC, Generic[CaptureT]):
    """A way to get the contribution of each example of a batch while a model is trained on it.

    Args:
        model: the model in training.
        direction: where learning should go.
    """

    tolerance: ClassVar[float | None] = 0.05
    """Largest relative error that `verify_first` lets pass; None: the method is an approximation."""
    sees_noise: ClassVar[bool] = True
    """Whether it can find |∇l|²: see `TargetDirection.step_noise`."""
    watches: ClassVar[bool] = True
    """Whether `Capture.watch` takes losses of a forward pass of yours; else the method needs the batch."""

    def __init__(self, model: nn.Module, direction: TargetDirection) -> None:
        self.model = model
        self.direction = direction
        if not self.sees_noise:
            direction.leave_out_noise()
        self._verify_next = self._verify_again = 0
        self._verifying: Capture | None = None

    def capture(self, ids: ArrayLike | None) -> CaptureT:
        """A capture for one batch, to be used as `with contributions.capture(ids) as capture:`.

        Refreshes the direction first when it is due.

        Args:
            ids: the example of each row: integers [B], a tensor, an array or a list. None: `Capture.identify` tells
                them once they are known.
        """
        refreshed = self.direction.advance()
        if refreshed:
            self._refreshed()
        capture = self._capture(ids)
        capture.trains(self.direction.noise())
        if refreshed:
            capture.note_losses()
        if self._verifying is not None and self._verifying.verified is False:
            self._verify_next, self._verifying = self._verify_again, None  # nothing was known of that step
        if self._verify_next and self.tolerance is not None:
            capture.verify(self._verify_next, self.tolerance)
            self._verify_again, self._verify_next, self._verifying = self._verify_next, 0, capture
        return capture

    def capture_losses(self, ids: ArrayLike | None, *, last: bool = False) -> LossCapture:
        """A capture for a batch whose contributions are not measured; the direction stays as it is.

        Args:
            ids: as in `capture`.
            last: whether contributions of no later batch are measured either: then the gradients of this one are not
                read for a norm-matched direction.
        """
        capture = LossCapture(self.direction, ids)
        if self.direction.norm_matched and not last:
            self.direction.expect_gradients()
            capture.trains(None)
        return capture

    def verify_first(self, examples: int = 4) -> None:
        """Has the next step's first examples compared with gradients of their own, at a backward pass for each.

        If nothing is known of that step, the one after. It raises `ContributionsDifferError` if they differ. Nothing
        is compared for approximations, and for models whose parameters are sharded.

        Args:
            examples: how many.
        """
        self._verify_next = 0 if sharded_modules(self.model) else examples

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
        before = ModelState(self.model)
        with repeating(self.model, before):
            losses = self.direction.quiet_losses(batch)
            expected = per_example(losses[:examples], self.direction.vectors)
        with unreduced(self.model), repeating(self.model, before), self._capture(range(len(losses))) as capture:
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
    def _capture(self, ids: ArrayLike | None) -> CaptureT: ...

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
        products = [product_of(_dense(g), vectors[p]) for g, p in pairs if g is not None]
        contributions.append(torch.stack(products).sum() if products else torch.zeros((), dtype=torch.float64))
    return torch.stack(contributions)


def _integers(ids: ArrayLike) -> NDArray[np.uint64]:
    array = ids.detach().cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
        names = "; `equipoise.ExampleKeys` gives ids to names" if array.dtype.kind in "USO" else ""
        what = f"ids of shape {array.shape} and type {array.dtype}"
        raise CaptureError(f"{what}: must be one integer for each example of the batch{names}")
    if array.dtype.kind == "i" and array.min() < 0:
        raise CaptureError(f"ids: {int(array.min())} must not be negative")
    return array.astype(np.uint64)


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient


def _numpy(values: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = values.to("cpu", torch.float32).numpy()
    return array
