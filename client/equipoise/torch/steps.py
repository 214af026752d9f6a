"""The steps of a training loop under a policy: weights in, statistics out, and nothing waits for the network."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from equipoise.torch.capture import Capture, Contributions, join
from equipoise.torch.errors import CaptureError
from equipoise.torch.losses import weighted_mean
from equipoise.torch.one_pass import OnePassContributions
from equipoise.wire import StepFields

T = TypeVar("T")


class Policy(Protocol):
    """What gives weights for statistics: a `PolicyClient`."""

    def weights(self, ids: ArrayLike) -> NDArray[np.float32]:
        """The newest weights known."""

    def submit(self, ids: ArrayLike | None = None, **fields: Unpack[StepFields]) -> None:
        """Sends statistics and does not wait."""


class WeightedStep(AbstractContextManager["WeightedStep"]):
    """One batch, or micro-batch: a context manager around its forward and backward pass.

    Attributes:
        capture: what takes the statistics.
        weights: the weights of the rows, float32 [B]: the newest that were known when the step began.
    """

    def __init__(self, steps: "WeightedSteps", capture: Capture, *, upcoming: ArrayLike | None) -> None:
        self.capture = capture
        self.weights = steps.weights(capture.ids)
        self.upcoming = upcoming
        self._steps = steps

    def loss(self, batch: Any) -> Tensor:
        """The forward pass, and the weighted mean of its losses: call `.backward()` on it within the block."""
        return self._mean(self.capture.losses(batch))

    def weigh(self, losses: Tensor) -> Tensor:
        """The weighted mean of the loss of each example, [B], from a forward pass of yours."""
        return self._mean(self.capture.watch(losses))

    def _mean(self, losses: Tensor) -> Tensor:
        return weighted_mean(losses, self.weights) * self._steps.scale

    def __enter__(self) -> Self:
        self.capture.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.capture.__exit__(kind, error, trace)
        if error is None:
            self._steps.take(self)


class WeightedSteps:
    """Trains under the weights of a policy and sends what it learns from: the whole of a loop's part, in two lines.

    Weights are the newest known when a step begins; statistics are sent when it ends; the network is in between,
    beside the training. The answer to a step holds the weights of its own rows, for their next visit. With `upcoming`
    it holds those of the next batch instead, from all that every trainer has found out up to now: they are one step
    old when they are used, or a few on a slow network, and at most the client's `max_staleness`.

    Example:
        >>> direction = TargetDirection(model, example_losses, target_batches)
        >>> steps = WeightedSteps(client, GhostContributions(model, direction))
        >>> for (ids, batch), following in look_ahead(loader):
        ...     with steps.capture(ids, upcoming=following and following[0]) as step:
        ...         step.loss(batch).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()

    Args:
        client: a `PolicyClient`.
        contributions: how they are found: any method but `OnePassContributions`, which weighs in the same step.
        accumulate: micro-batches to an optimizer's step: each loss is divided by it, and their statistics are sent
            together. None: the loop scales losses itself and calls `submit`.
        sampled: the examples come from a `WeightedSampler`, so that losses are not weighted again.

    Raises:
        CaptureError: the method makes a backward pass of its own.
    """

    def __init__(
        self,
        client: Policy,
        contributions: Contributions[Any],
        *,
        accumulate: int | None = 1,
        sampled: bool = False,
    ) -> None:
        if isinstance(contributions, OnePassContributions):
            raise CaptureError(
                "contributions = OnePassContributions: makes its own backward pass, under weights of the same step: "
                "use its capture with `client.step`"
            )
        if accumulate is not None and accumulate < 1:
            raise CaptureError(f"accumulate = {accumulate}: must be at least 1")
        self.client = client
        self.contributions = contributions
        self._accumulate = accumulate
        self._sampled = sampled
        self._taken: list[WeightedStep] = []

    @property
    def scale(self) -> float:
        """What a micro-batch's mean loss is multiplied by."""
        return 1.0 if self._accumulate is None else 1.0 / self._accumulate

    def capture(self, ids: ArrayLike, *, upcoming: ArrayLike | None = None) -> WeightedStep:
        """A step on one batch, to be used as `with steps.capture(ids) as step:`.

        Args:
            ids: the example of each row: integers [B], a tensor, an array or a list.
            upcoming: the examples of the next batch, if known: `look_ahead` tells them.
        """
        return WeightedStep(self, self.contributions.capture(ids), upcoming=upcoming)

    def weights(self, ids: NDArray[np.uint64]) -> NDArray[np.float32]:
        """The weights that losses get: float32 [B]."""
        return np.ones(len(ids), np.float32) if self._sampled else self.client.weights(ids)

    def take(self, step: WeightedStep) -> None:
        """A step is over: its statistics are sent, or wait for those of its other micro-batches."""
        self._taken.append(step)
        if self._accumulate is not None and len(self._taken) >= self._accumulate:
            self.submit()

    def submit(self, *, step: int | None = None) -> None:
        """Sends what was captured since the last time, if anything, and does not wait.

        Args:
            step: the training step; informational.
        """
        taken, self._taken = self._taken, []
        if not taken:
            return
        first = taken[0].capture
        ids, fields = (first.ids, first.fields()) if len(taken) == 1 else join(*(one.capture for one in taken))
        upcoming = [np.asarray(one.upcoming) for one in taken if one.upcoming is not None]
        if upcoming:
            fields["weights_for"] = np.concatenate(upcoming)
        if step is not None:
            fields["step"] = step
        self.client.submit(ids, **fields)


def look_ahead(batches: Iterable[T]) -> Iterator[tuple[T, T | None]]:
    """Each batch together with the one after it; None after the last.

    Example:
        >>> list(look_ahead("abc"))
        [('a', 'b'), ('b', 'c'), ('c', None)]
    """
    rest = iter(batches)
    try:
        current = next(rest)
    except StopIteration:
        return
    for following in rest:
        yield current, following
        current = following
    yield current, None
