"""How the trainer of a framework uses a policy: what its user says, and what follows from that."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import nn
from torch.optim import Optimizer

from equipoise.client import PolicyClient
from equipoise.errors import InvalidRequestError
from equipoise.torch.capture import Contributions
from equipoise.torch.direction import ExampleLoss, TargetDirection
from equipoise.torch.ghost import GhostContributions, LastLayerContributions
from equipoise.torch.processes import world
from equipoise.torch.second_pass import FiniteDifferenceContributions
from equipoise.torch.steps import WeightedSteps

Method: TypeAlias = (
    Literal["ghost", "finite_difference", "last_layer"] | Callable[[nn.Module, TargetDirection], Contributions[Any]]
)
"""A way to find contributions, by name, or what makes one from a model and a direction."""

METHODS: dict[str, Callable[[nn.Module, TargetDirection], Contributions[Any]]] = {
    "ghost": GhostContributions,
    "finite_difference": FiniteDifferenceContributions,
    "last_layer": LastLayerContributions,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOptions:
    """How contributions are found and weights are used; good for most jobs as it is.

    Attributes:
        method: `ghost`; `finite_difference` for modules that hooks cannot see through, compiled and sharded models;
            `last_layer`; or a function from (model, direction), such as `partial(GhostContributions, shared=[...])`.
        refresh_every: optimizer steps between two refreshes of the target direction.
        preconditioned: whether the direction is where the job's Adam optimizer would go.
        sampled: whether examples are drawn by weight instead of weighing their losses.
        keep: forks of the policy that stay on the server for checkpoints; None: all.
    """

    method: Method = "ghost"
    refresh_every: int = 10
    preconditioned: bool = False
    sampled: bool = False
    keep: int | None = 3

    def __post_init__(self) -> None:
        if not callable(self.method) and self.method not in METHODS:
            rule = f"must be one of {', '.join(METHODS)}, or a function from a model and a direction"
            raise InvalidRequestError(field="method", value=repr(self.method), rule=rule)

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
            refresh_every=self.refresh_every * accumulate,
            guard_batches=guard,
            preconditioner=optimizer if self.preconditioned else None,
            group=world(),
        )

    def steps(self, client: PolicyClient, model: nn.Module, direction: TargetDirection) -> WeightedSteps:
        """The steps of a trainer that scales losses and says when a step is over."""
        method = self.method if callable(self.method) else METHODS[self.method]
        return WeightedSteps(client, method(model, direction), accumulate=None, sampled=self.sampled)
