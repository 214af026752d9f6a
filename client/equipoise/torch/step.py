"""One batch of a training job under a policy, from its forward pass to its statistics."""

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from equipoise.torch.capture import Capture
from equipoise.torch.errors import CaptureError
from equipoise.torch.losses import as_weights, weighted_mean


class Job(Protocol):
    """What a step is one of: `WeightedSteps`."""

    @property
    def scale(self) -> float:
        """What a micro-batch's mean loss is multiplied by."""

    def weights(self, ids: NDArray[np.uint64]) -> NDArray[np.float32]:
        """The newest weights known of ids: float32 [B]."""

    def ask(self, step: "WeightedStep") -> NDArray[np.float32]:
        """The weights for the losses of a step, from the policy: float32 [B]."""

    def take(self, step: "WeightedStep | None") -> None:
        """A step is over; None: nothing is known of it."""

    def note_skipped(self) -> None:
        """A step had no backward pass."""


class WeightedStep(AbstractContextManager["WeightedStep"]):
    """One batch, or micro-batch: a context manager around its forward and backward pass.

    A batch that is skipped leaves nothing behind: nothing of it is sent, unless its backward pass was made within the
    block; where losses come first, these were sent with the forward pass.

    Args:
        steps: the job.
        capture: what takes the statistics.
        groups: the group of each row, [B]; None: there are none, or they come with the losses.
        upcoming: the examples of the next batch, if known.
        losses_first: whether losses are sent before the backward pass, for weights of this very step.
        measured: whether the capture has contributions.

    Attributes:
        capture, upcoming, losses_first, measured: as given.
        groups: integers [B], or None.
    """

    def __init__(
        self,
        steps: Job,
        capture: Capture,
        *,
        groups: ArrayLike | None,
        upcoming: ArrayLike | None,
        losses_first: bool,
        measured: bool,
    ) -> None:
        self.capture = capture
        self.upcoming = upcoming
        self.losses_first = losses_first
        self.measured = measured
        self.groups = None if groups is None else _on_host(groups)
        self._steps = steps
        self._weights = steps.weights(capture.ids) if capture.identified and not losses_first else None
        self._weighed = self._trained = self._discarded = self._over = False

    @property
    def weights(self) -> NDArray[np.float32]:
        """The weights of the rows: float32 [B], the newest that were known when their ids were; where losses come
        first, those that the policy gave for the losses.

        Raises:
            CaptureError: the ids, or the losses, are not known yet.
        """
        if self._weights is None:
            self._weights = self._steps.ask(self) if self.losses_first else self._steps.weights(self.capture.ids)
        return self._weights

    @property
    def weighed(self) -> bool:
        """Whether losses were weighed."""
        return self._weighed

    @property
    def over(self) -> bool:
        """Whether it was ended or discarded."""
        return self._over

    def loss(self, batch: Any, *, ids: ArrayLike | None = None, groups: ArrayLike | None = None) -> Tensor:
        """The forward pass, and the weighted mean of its losses: call `.backward()` on it within the block.

        Args:
            batch: what the losses of the direction take.
            ids: the example of each row, [B], if the step began without.
            groups: the group of each row, integers [B], if the step began without.
        """
        self._identify(ids, groups)
        return self._mean(self.capture.losses(batch))

    def weigh(self, losses: Tensor, *, ids: ArrayLike | None = None, groups: ArrayLike | None = None) -> Tensor:
        """The weighted mean of the loss of each example, [B], from a forward pass of yours within the block.

        Args:
            losses: the loss of each example, [B].
            ids: the example of each row, [B], if the step began without.
            groups: the group of each row, integers [B], if the step began without.
        """
        self._identify(ids, groups)
        return self._mean(self.capture.watch(losses))

    def combine(self, losses: Tensor, shares: Tensor) -> Tensor:
        """Σ weight·share·loss of the losses that `capture` gave, where a batch's loss is no mean over examples.

        Args:
            losses: the loss of each example, [B].
            shares: what each counts for without a policy: float [B].
        """
        return self._final((as_weights(self.weights, losses) * shares.to(losses) * losses).sum())

    def discard(self) -> None:
        """Nothing more of this batch is sent, whether the model is trained on it or not."""
        self._discarded = True
        if not self._over:
            self._close()
            self._steps.take(None)

    def end(self) -> None:
        """The backward pass was made: the statistics are sent, or wait for those of other micro-batches.

        Without a backward pass they are discarded.
        """
        if self._over:
            return
        self._close()
        self._steps.take(self if self._trained else None)
        if not self._trained:
            self._steps.note_skipped()

    def _identify(self, ids: ArrayLike | None, groups: ArrayLike | None) -> None:
        if ids is not None:
            self.capture.identify(ids)
        if groups is not None:
            self.groups = _on_host(groups)

    def _mean(self, losses: Tensor) -> Tensor:
        return self._final(weighted_mean(losses, self.weights))

    def _final(self, loss: Tensor) -> Tensor:
        loss = loss * self._steps.scale
        self._weighed = True
        loss.register_hook(self._arrived)  # type: ignore[no-untyped-call]
        return loss

    def _arrived(self, gradient: Tensor) -> None:
        """The backward pass begins."""
        if self._over and not (self._trained or self._discarded):
            raise CaptureError(
                "the backward pass belongs into the `with` block, or before `end()`, since it is there that "
                "contributions are taken; call `discard()` in the block where nothing shall be known of a batch"
            )
        self._trained = True

    def _close(self, error: BaseException | None = None) -> None:
        self._over = True
        self.capture.__exit__(None if error is None else type(error), error, None)

    def __enter__(self) -> Self:
        self.capture.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.end()
        elif not self._over:
            self._discarded = True
            self._close(error)
            self._steps.take(None)


def _on_host(groups: ArrayLike) -> NDArray[Any]:
    return groups.detach().cpu().numpy() if isinstance(groups, Tensor) else np.asarray(groups)
