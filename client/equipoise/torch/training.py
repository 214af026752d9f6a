"""How the trainer of a framework uses a policy: what its user says, and what follows from that."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

from torch import nn
from torch.optim import Optimizer

from equipoise.client import PolicyClient
from equipoise.errors import InvalidRequestError, require
from equipoise.torch.capture import Contributions
from equipoise.torch.direction import ExampleLoss, TargetDirection
from equipoise.torch.ghost import GhostContributions, LastLayerContributions
from equipoise.torch.processes import world
from equipoise.torch.schedule import Schedule
from equipoise.torch.second_pass import FiniteDifferenceContributions, JvpContributions
from equipoise.torch.sketch import SketchContributions
from equipoise.torch.steps import WeightedSteps

Method: TypeAlias = (
    Literal["ghost", "jvp", "finite_difference", "last_layer", "sketch"]
    | Callable[[nn.Module, TargetDirection], Contributions[Any]]
)
"""A way to find contributions, by name, or what makes one from a model and a direction."""

METHODS: dict[str, Callable[..., Contributions[Any]]] = {
    "ghost": GhostContributions,
    "jvp": JvpContributions,
    "finite_difference": FiniteDifferenceContributions,
    "last_layer": LastLayerContributions,
    "sketch": SketchContributions,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOptions:
    """How contributions are found and weights are used; good for most jobs as it is.

    Example:
        >>> TrainingOptions(method="jvp", refresh_every=20)
        >>> TrainingOptions(also=(Router,), shared=["positions"])
        >>> TrainingOptions(method=partial(LastLayerContributions, layer="lm_head"))

    Attributes:
        method: `ghost`; `jvp` for losses that hooks cannot tell apart, as with batch normalisation or in-batch
            negatives: exact, about a step more; `finite_difference` for sharded models and operations without
            forward-mode differentiation: right to about 0.5 %; `last_layer` and `sketch`, which are estimates; or a
            function from (model, direction), for a method with options of its own.
        also: for `ghost`, as in `GhostContributions`: types of modules that are differentiated as a whole.
        shared: for `ghost` and `sketch`: paths of modules whose output all examples share.
        refresh_every: optimizer steps between two refreshes of the target direction.
        batches_per_refresh: how many target batches one refresh takes, in turn; None: all of them.
        momentum: share of the direction before that a refresh keeps, in [0, 1). With it, checkpoints hold a
            direction, as large as the trainable parameters.
        preconditioned: whether the direction is where the job's Adam optimizer would go.
        norm_matched: whether contributions are norm-matched: what an example does for the target at equal step length,
            as in `TargetDirection`. Not for `trajectory`, whose weights move by plain ones; SIM, which the policy then
            has of what is sent, is logged of plain ones as `policy/plain_sim`. Checkpoints hold an average of the
            gradients, as large as the trainable parameters.
        sampled: whether examples are drawn by weight instead of weighing their losses.
        measure_every, measure_from, measure_until: which batches are measured, as in `WeightedSteps`: contributions of
            every k-th batch, or micro-batch, alone, for rule `strata`, and for others with `sampled`.
        guard_every: as in `WeightedSteps`: batches between two losses on guard B after `measure_until`.
        relative: as in `WeightedSteps`: contributions are sent relative to their batch.
        verify: whether contributions of the first step's first examples are compared with gradients of their own, at
            a backward pass for each of four; a job whose contributions are wrong stops there.
        keep: forks of the policy that stay on the server for checkpoints; None: all.

    Raises:
        InvalidRequestError: there is no such method, it does not take `also` or `shared`, or a number is too small.
    """

    method: Method = "ghost"
    also: tuple[type[nn.Module], ...] = ()
    shared: Sequence[str] = ()
    refresh_every: int = 10
    batches_per_refresh: int | None = None
    momentum: float = 0.0
    preconditioned: bool = False
    norm_matched: bool = False
    sampled: bool = False
    measure_every: int = 1
    measure_from: int = 0
    measure_until: int | None = None
    guard_every: int | None = None
    relative: bool = False
    verify: bool = True
    keep: int | None = 3

    def __post_init__(self) -> None:
        if not callable(self.method) and self.method not in METHODS:
            rule = f"must be one of {', '.join(METHODS)}, or a function from a model and a direction"
            raise InvalidRequestError(field="method", value=repr(self.method), rule=rule)
        self.schedule  # noqa: B018 - raises what is wrong with it
        require(
            not self.relative or self.method != "sketch",
            field="relative",
            value=self.relative,
            rule="is not for method sketch, which leaves it to the server to find contributions",
        )
        for name, given, methods in (("also", self.also, ("ghost",)), ("shared", self.shared, ("ghost", "sketch"))):
            if given and self.method not in methods:
                rule = f"is for method {' and '.join(methods)} alone; give a function as method for others"
                raise InvalidRequestError(field=name, value=repr(given), rule=rule)

    @property
    def schedule(self) -> Schedule:
        """Which batches are measured."""
        return Schedule(
            every=self.measure_every, start=self.measure_from, until=self.measure_until, guard_every=self.guard_every
        )

    def direction(
        self,
        model: nn.Module,
        losses: ExampleLoss,
        target: Iterable[Any],
        *,
        guard: Iterable[Any] | None,
        optimizer: Optimizer | None,
        accumulate: int = 1,
    ) -> TargetDirection:
        """The target direction of a job: shared by all its processes, each of which gives its part of the batches."""
        return TargetDirection(
            model,
            losses,
            target,
            refresh_every=max(1, self.refresh_every * accumulate // self.measure_every),  # of those measured
            guard_batches=guard,
            preconditioner=optimizer if self.preconditioned else None,
            batches_per_refresh=self.batches_per_refresh,
            momentum=self.momentum,
            group=world(),
            norm_matched=self.norm_matched,
        )

    def steps(self, client: PolicyClient, model: nn.Module, direction: TargetDirection) -> WeightedSteps:
        """The steps of a trainer that scales losses and says when a step is over."""
        method: Callable[..., Contributions[Any]] = self.method if callable(self.method) else METHODS[self.method]
        if self.also:
            method = partial(method, also=self.also)
        if self.shared:
            method = partial(method, shared=self.shared)
        return WeightedSteps(
            client,
            method(model, direction),
            accumulate=None,
            sampled=self.sampled,
            measure_every=self.measure_every,
            measure_from=self.measure_from,
            measure_until=self.measure_until,
            guard_every=self.guard_every,
            relative=self.relative,
            verify=self.verify,
        )


class HostBatches:
    """Batches that stay where they are, and are moved one at a time.

    A refresh of the target direction takes one batch after another: of a target set that is kept on the device whole,
    nearly all of it would only take memory there.

    Args:
        batches: the batches, on the host.
        move: from a batch to the batch on the device.
    """

    def __init__(self, batches: Iterable[Any], move: Callable[[Any], Any]) -> None:
        self._batches = list(batches)
        self._move = move

    def __len__(self) -> int:
        """How many batches there are."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        """The batches on the device."""
        return map(self._move, self._batches)
