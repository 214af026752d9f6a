"""Where learning should go: the gradient of the target loss."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from equipoise.torch.errors import DirectionError
from equipoise.torch.losses import LossMean
from equipoise.torch.preconditioner import AdamPreconditioner
from equipoise.torch.processes import (
    Group,
    is_accumulating,
    num_averaged,
    scratch_gradients,
    sharded_modules,
    total,
    unwrapped,
    whole,
    world,
)
from equipoise.torch.quiet import evaluating
from equipoise.torch.vectors import load_vectors, named_vectors

ExampleLoss: TypeAlias = Callable[[Any, Any], Tensor]
"""From a model and a batch to the loss of each example, nats: [B]."""


class TargetDirection:
    """The gradient of the mean loss on target examples, refreshed as training goes on.

    It is computed with `torch.autograd.grad` in evaluation mode: `.grad`, the optimizer, the modes of modules and the
    random generators are left alone.

    Several processes: a model in DistributedDataParallel is looked at without its wrapper. With a `group` each process
    gives target and guard batches of its own, and all get the direction of all of them; every process must then make
    the same captures. The parts of a sharded model (`fully_shard`) always refresh together, with equally many batches,
    and not while gradients are accumulated unreduced: a refresh that is due then waits.

    Example:
        >>> def example_losses(model, batch):
        ...     return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")
        >>> direction = TargetDirection(model, example_losses, target_loader, guard_batches=guard_loader)

    Args:
        model: the model in training.
        loss_fn: from (model, batch) to the loss of each example, [B].
        target_batches: batches of target A: a list or a loader, anything that can be iterated again and again. 64
            sequences or more: with fewer the direction is mostly noise, however fresh it is.
        refresh_every: captures between two refreshes. Early in a training, while everything moves, a fresher direction
            ranks examples better; beyond 10 steps age makes little difference, and a larger target set is the better
            use of the same time (measured: tests/benchmarks/RESULTS.md). With gradient accumulation each micro-batch
            is a capture.
        preconditioner: the Adam optimizer of the job: the direction is then where its step would lead.
        guard_batches: batches of guard B, on which nothing but `guard_loss` is computed.
        batches_per_refresh: how many target batches one refresh takes, in turn; default: all of them.
        momentum: share of the direction before that a refresh keeps, in [0, 1). Part of a fresh direction swings with
            the model from step to step and makes all examples seem harmful, then useful; the average keeps what lasts.
        group: the processes that share the work, such as `torch.distributed.group.WORLD`; default: each works alone.

    Attributes:
        vectors: the direction by parameter, in the dtype of the parameter; empty before the first refresh.
        target_loss: mean loss on target A at the last refresh, nats: a tensor without dimensions.
        guard_loss: mean loss on guard B at the last refresh, nats; None without guard batches.
        age: captures since the last refresh.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: ExampleLoss,
        target_batches: Iterable[Any],
        *,
        refresh_every: int = 10,
        preconditioner: Optimizer | None = None,
        guard_batches: Iterable[Any] | None = None,
        batches_per_refresh: int | None = None,
        momentum: float = 0.0,
        group: Group = None,
    ) -> None:
        _check_repeatable("target_batches", target_batches)
        _check_repeatable("guard_batches", guard_batches)
        _check_positive("refresh_every", refresh_every)
        if batches_per_refresh is not None:
            _check_positive("batches_per_refresh", batches_per_refresh)
        if not 0.0 <= momentum < 1.0:
            raise DirectionError(f"momentum = {momentum}: must be in [0, 1)")
        self.model = model
        self.loss_fn = loss_fn
        self.vectors: dict[nn.Parameter, Tensor] = {}
        self.target_loss: Tensor | None = None
        self.guard_loss: Tensor | None = None
        self.age = 0
        self._target = target_batches
        self._guard = guard_batches
        self._refresh_every = refresh_every
        self._precondition = None if preconditioner is None else AdamPreconditioner(preconditioner)
        self._batches_per_refresh = batches_per_refresh
        self._momentum = momentum
        self._turn: Iterator[Any] = iter(())
        self._taken = 0
        self._group = group

    def advance(self) -> bool:
        """Counts one capture and refreshes when it is due; returns whether it was."""
        due = not self.vectors or self.age + 1 >= self._refresh_every
        if due and not (self.vectors and is_accumulating(self.model)):
            self.refresh()
            return True
        self.age += 1
        return False

    def refresh(self) -> None:
        """Computes the direction and the losses at the parameters of now.

        Raises:
            DirectionError: there is nothing to differentiate, or the losses are not one per example.
        """
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not parameters:
            raise DirectionError("model: has no trainable parameter")
        with evaluating(self.model):
            gradients, self.target_loss = self._gradients(parameters)
            self.guard_loss = None if self._guard is None else self._mean_loss(self._guard)
        self.vectors = self._averaged(self._precondition(gradients) if self._precondition else gradients)
        self.age = 0

    def losses(self, batch: Any) -> Tensor:
        """The loss of each example of a batch, with its graph: [B]."""
        return checked_losses(self.loss_fn(self.model, batch))

    def quiet_losses(self, batch: Any) -> Tensor:
        """The same past DistributedDataParallel: no process waits for another one's gradients."""
        return checked_losses(self.loss_fn(unwrapped(self.model), batch))

    @property
    def norm(self) -> Tensor:
        """Euclidean norm of the direction: float64, without dimensions."""
        return torch.stack([whole(vector.double().square().sum()) for vector in self.vectors.values()]).sum().sqrt()

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: numbers and tensors, the vectors among them, as large as the trainable parameters.

        Of a sharded model the part of this process. Without it a resumed job begins with a refresh.
        """
        return {
            "age": self.age,
            "batches_taken": self._taken,
            "target_loss": self.target_loss,
            "guard_loss": self.guard_loss,
            "vectors": named_vectors(self.model, self.vectors),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where the direction stood that gave `state`, of a model of the same shape.

        Raises:
            DirectionError: the vectors are not those of this model.
        """
        self.vectors = load_vectors(self.model, state["vectors"])
        self.age, self._taken = state["age"], state["batches_taken"]
        self.target_loss, self.guard_loss = state["target_loss"], state["guard_loss"]
        self._turn = islice(iter(self._target), self._taken, None) if self._taken else iter(())

    def _averaged(self, fresh: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """The fresh direction, with what is kept of those before."""
        kept = self._momentum
        if not kept:
            return fresh
        old = self.vectors
        return {p: torch.lerp(vector, old[p], kept) if p in old else vector for p, vector in fresh.items()}

    def _gradients(self, parameters: list[nn.Parameter]) -> tuple[dict[nn.Parameter, Tensor], Tensor]:
        """Gradient of the mean loss over the target batches, and that loss."""
        sharded = bool(sharded_modules(self.model))
        group = world() if sharded else self._group
        sums: dict[nn.Parameter, Tensor] = {} if group is None else {p: torch.zeros_like(p) for p in parameters}
        means = LossMean()
        for batch in self._next_batches():
            with torch.enable_grad():
                losses = self.quiet_losses(batch)
                gradients = self._reduced(losses, parameters) if sharded else _gradient(losses.sum(), parameters)
            means.add(losses)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    sums[parameter] = _dense(gradient) if parameter not in sums else sums[parameter] + _dense(gradient)
        mean, count = means.over(group, field="target_batches")
        if not sharded:
            sums = {parameter: total(gradient, group) for parameter, gradient in sums.items()}
        return {parameter: gradient / count for parameter, gradient in sums.items()}, mean

    def _reduced(self, losses: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
        """Gradients of the sum of the losses of all processes, each with its shards, by a backward pass of all."""
        with scratch_gradients(self.model, parameters):
            losses.sum().backward()  # type: ignore[no-untyped-call]
            averaged = num_averaged(parameters)
            return [None if parameter.grad is None else parameter.grad * averaged for parameter in parameters]

    def _mean_loss(self, batches: Iterable[Any]) -> Tensor:
        means = LossMean()
        with torch.no_grad():
            for batch in batches:
                means.add(self.quiet_losses(batch))
        return means.over(world() if sharded_modules(self.model) else self._group, field="guard_batches")[0]

    def _next_batches(self) -> Iterator[Any]:
        if self._batches_per_refresh is None:
            yield from self._target
            return
        batches = list(islice(self._turn, self._batches_per_refresh))
        self._taken += len(batches)
        if len(batches) < self._batches_per_refresh:
            self._turn = iter(self._target)
            first = list(islice(self._turn, self._batches_per_refresh - len(batches)))
            self._taken, batches = len(first), batches + first
        yield from batches


def checked_losses(losses: Tensor, count: int | None = None) -> Tensor:
    """The losses, if there is one per example.

    Raises:
        DirectionError: there is not.
    """
    if losses.ndim != 1 or (count is not None and len(losses) != count):
        expected = "one loss per example" if count is None else f"one loss for each of {count} examples"
        raise DirectionError(
            f"losses of shape {tuple(losses.shape)}: must be {expected}; use reduction='none' and average over tokens"
        )
    return losses


def _gradient(loss: Tensor, parameters: list[nn.Parameter]) -> tuple[Tensor | None, ...]:
    try:
        return torch.autograd.grad(loss, parameters, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise DirectionError(
            "model: checkpoints activations with use_reentrant=True in evaluation mode, through which only `.grad` can "
            "be computed: use use_reentrant=False"
        ) from error


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient


def _check_repeatable(field: str, batches: Iterable[Any] | None) -> None:
    if isinstance(batches, Iterator):
        raise DirectionError(f"{field} = {type(batches).__name__}: can be read once only; give a list or a loader")


def _check_positive(field: str, value: int) -> None:
    if value < 1:
        raise DirectionError(f"{field} = {value}: must be at least 1")
