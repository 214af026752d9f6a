"""How the trainer of a framework uses a policy: what its user says, and what follows from that."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from math import inf
from typing import Any, Final, Literal, TypeAlias

from torch import nn
from torch.optim import Optimizer

from equipoise.client import PolicyClient
from equipoise.errors import InvalidRequestError, is_integer, require
from equipoise.torch.capture import Contributions
from equipoise.torch.direction import ExampleLoss, TargetDirection
from equipoise.torch.ghost import GhostContributions, LastLayerContributions
from equipoise.torch.policy import rule_of
from equipoise.torch.processes import same_everywhere, world
from equipoise.torch.schedule import Schedule
from equipoise.torch.second_pass import FiniteDifferenceContributions, JvpContributions
from equipoise.torch.sketch import SketchContributions
from equipoise.torch.steps import Accumulating, WeightedSteps
from equipoise.torch.target_losses import LossesAlone

logger = logging.getLogger("equipoise")

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
class Measuring:
    """What is measured, as suits a rule; attributes are those of `TrainingOptions`."""

    measure_every: int = 1
    compare_every: int = 0
    refresh_every: int = 10
    look_every: int = 1
    batches_per_refresh: int | Literal["all"] = "all"
    momentum: float = 0.0
    norm_matched: bool = False
    step_noise: float = 0.0


MEASURING: Final[Mapping[str, Measuring]] = {
    "strata": Measuring(
        measure_every=0,
        compare_every=6,
        refresh_every=3,
        look_every=10,
        batches_per_refresh=1,
        momentum=0.85,
        norm_matched=True,
        step_noise=2.0,
    )
}
"""By rule, where it is not `Measuring()`. For strata losses are enough: those of the training, and of target examples.
Where contributions of some batches are measured for them, it is along the mean of many looks at a part of the target.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOptions:
    """What is measured for a policy, and how its weights are used; good for most jobs as it is.

    What is None is what suits the rule of the policy: see `MEASURING`.

    Example:
        >>> TrainingOptions(method="jvp", refresh_every=20)
        >>> TrainingOptions(also=(Router,), shared=["positions"])
        >>> TrainingOptions(method=partial(LastLayerContributions, layer="lm_head"))

    Attributes:
        method: how contributions are found, where they are measured: `ghost`; `jvp` for losses that hooks cannot tell
            apart, as with batch normalisation or in-batch negatives: exact, about a step more; `finite_difference` for
            sharded models and operations without forward-mode differentiation: right to about 0.5 %; `last_layer` and
            `sketch`, which are estimates; or a function from (model, direction), for a method with options of its own.
        also: for `ghost`, as in `GhostContributions`: types of modules that are differentiated as a whole.
        shared: for `ghost` and `sketch`: paths of modules whose output all examples share.
        refresh_every: optimizer steps between two refreshes of the target direction.
        look_every: refreshes between two at which the loss on guard B is measured, and contributions are checked.
        batches_per_refresh: how many target batches one refresh takes, in turn, or `all` of them.
        momentum: share of the direction before that a refresh keeps, in [0, 1). With it, checkpoints hold a
            direction, as large as the trainable parameters.
        preconditioned: whether the direction is where the job's Adam optimizer would go.
        norm_matched: whether contributions are norm-matched: what an example does for the target at equal step length,
            as in `TargetDirection`. Not for `trajectory`, whose weights move by plain ones; SIM, which the policy then
            has of what is sent, is logged of plain ones as `policy/plain_sim`. Checkpoints hold an average of the
            gradients, as large as the trainable parameters.
        step_noise: how often an example's own gradient counts in the length of a step, as in `TargetDirection`; 0: not.
        sampled: whether examples are drawn by weight instead of weighing their losses.
        measure_every, measure_from, measure_until: which batches are measured, as in `WeightedSteps`: contributions of
            every k-th batch, or micro-batch, alone, for rule `strata`, which is content with none too: 0; and for
            others with `sampled`.
        compare_every: before every k-th batch, or micro-batch, losses of target examples are measured, by a forward
            pass, and sent with those of the batch: for rule `strata`. 0: never.
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
    refresh_every: int | None = None
    look_every: int | None = None
    batches_per_refresh: int | Literal["all"] | None = None
    momentum: float | None = None
    preconditioned: bool = False
    norm_matched: bool | None = None
    step_noise: float | None = None
    sampled: bool = False
    measure_every: int | None = None
    compare_every: int | None = None
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
        for name in ("refresh_every", "look_every"):
            every = getattr(self, name)
            fits = every is None or is_integer(every, 1, 1 << 31)
            require(fits, field=name, value=every, rule="must be an integer of at least 1")
        batches = self.batches_per_refresh
        fits = batches in (None, "all") or is_integer(batches, 1, 1 << 31)
        require(fits, field="batches_per_refresh", value=batches, rule="must be all or an integer of at least 1")
        fits = self.momentum is None or 0.0 <= self.momentum < 1.0
        require(fits, field="momentum", value=self.momentum, rule="must be in [0, 1)")
        fits = self.step_noise is None or 0.0 <= self.step_noise < inf
        require(fits, field="step_noise", value=self.step_noise, rule="must be finite and not negative")
        Schedule(
            every=1 if self.measure_every is None else self.measure_every,
            compare_every=1 if self.compare_every is None else self.compare_every,
            start=self.measure_from,
            until=self.measure_until,
            guard_every=self.guard_every,
        )
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

    def measuring(self, rule: str | None) -> Measuring:
        """What is measured for a rule; None: it is not known."""
        suits = MEASURING.get(rule or "", Measuring())
        given = {field.name: getattr(self, field.name) for field in fields(Measuring)}
        if given["norm_matched"] is False and self.step_noise is None:
            given["step_noise"] = 0.0
        return replace(suits, **{name: value for name, value in given.items() if value is not None})

    def steps(
        self,
        client: PolicyClient,
        model: nn.Module,
        losses: ExampleLoss,
        target: Iterable[Any],
        *,
        guard: Iterable[Any] | None = None,
        optimizer: Optimizer | None = None,
        accumulate: int = 1,
        accelerator: Accumulating | None = None,
        by_trainer: bool = False,
    ) -> WeightedSteps:
        """The steps of a job, and its target direction: shared by all its processes, each of which gives its batches.

        Args:
            client: the policy.
            model: the model in training.
            losses: from (model, batch) to the loss of each example, [B].
            target: batches of target A: a list or a loader, anything that can be iterated again and again.
            guard: batches of guard B.
            optimizer: the job's, for `preconditioned`.
            accumulate: micro-batches to an optimizer's step.
            accelerator: an `accelerate.Accelerator`, which scales losses, and says when statistics are sent.
            by_trainer: whether a trainer scales losses, and says when a step is over.
        """
        rule = same_everywhere(rule_of(client))  # the direction is refreshed by all together
        if rule is None:
            logger.warning(
                "the policy's rule is not known, and no server answers: plain contributions of every batch are "
                "measured; give PolicyClient(rule=...) for what suits it"
            )
        measuring = self.measuring(rule)
        every, batches = measuring.measure_every, measuring.batches_per_refresh
        micro = accumulate if accelerator is None else getattr(accelerator, "gradient_accumulation_steps", 1)
        direction = TargetDirection(
            model,
            losses,
            target,
            refresh_every=max(1, measuring.refresh_every * micro // max(1, every)),  # of those measured
            guard_batches=guard,
            look_every=measuring.look_every,
            preconditioner=optimizer if self.preconditioned else None,
            batches_per_refresh=None if batches == "all" else batches,
            momentum=measuring.momentum if every else 0.0,
            group=world(),
            norm_matched=measuring.norm_matched and every > 0,
            step_noise=measuring.step_noise if every else 0.0,
        )
        method: Callable[..., Contributions[Any]] = self.method if callable(self.method) else METHODS[self.method]
        if self.also:
            method = partial(method, also=self.also)
        if self.shared:
            method = partial(method, shared=self.shared)
        if not every:
            method = LossesAlone
        return WeightedSteps(
            client,
            method(model, direction),
            accumulate=None if by_trainer else accumulate,
            accelerator=accelerator,
            sampled=self.sampled,
            measure_every=every,
            compare_every=measuring.compare_every,
            measure_from=self.measure_from,
            measure_until=self.measure_until,
            guard_every=self.guard_every,
            relative=self.relative,
            verify=self.verify,
        )


def weighted_steps(
    client: PolicyClient,
    model: nn.Module,
    losses: ExampleLoss,
    target: Iterable[Any],
    *,
    guard: Iterable[Any] | None = None,
    accumulate: int = 1,
    accelerator: Accumulating | None = None,
    options: TrainingOptions | None = None,
) -> WeightedSteps:
    """The steps of a loop under a policy, with what suits its rule.

    Example:
        >>> steps = weighted_steps(client, model, example_losses, target_batches)
        >>> for ids, batch in loader:
        ...     with steps.capture(ids) as step:
        ...         step.loss(batch).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()

    Args:
        client: the policy.
        model: the model in training.
        losses: from (model, batch) to the loss of each example, [B].
        target: batches of target A, as large as those of the training: a list or a loader, anything that can be
            iterated again and again.
        guard: batches of guard B, on which nothing but `guard_loss` is computed.
        accumulate: micro-batches to an optimizer's step: each loss is divided by it.
        accelerator: an `accelerate.Accelerator`, which scales losses, and says when statistics are sent.
        options: what is to be otherwise.
    """
    made = options or TrainingOptions()
    return made.steps(client, model, losses, target, guard=guard, accumulate=accumulate, accelerator=accelerator)
