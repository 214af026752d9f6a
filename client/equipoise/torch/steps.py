"""The steps of a training job under a policy: weights in, statistics out, and nothing waits for the network."""

import logging
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from equipoise.client import PolicyClient
from equipoise.errors import InvalidRequestError
from equipoise.torch.capture import Contributions, join
from equipoise.torch.comparison import compared
from equipoise.torch.errors import CaptureError
from equipoise.torch.metrics import Metrics
from equipoise.torch.mixture import Mixture
from equipoise.torch.one_pass import OnePassContributions
from equipoise.torch.policy import LOSSES_FIRST, Policy, check_told_enough, rule_of
from equipoise.torch.resume import resume_run, run_state
from equipoise.torch.sampler import WeightedSampler
from equipoise.torch.schedule import Schedule
from equipoise.torch.sketch import SketchContributions
from equipoise.torch.step import WeightedStep
from equipoise.torch.target_losses import LossesAlone, TargetLosses
from equipoise.wire import StepFields

logger = logging.getLogger("equipoise")


class Accumulating(Protocol):
    """What says whether gradients are complete: an `accelerate.Accelerator`."""

    @property
    def sync_gradients(self) -> bool:
        """Whether the micro-batch of now is the last one before an optimizer's step."""


class WeightedSteps:
    """Trains under the weights of a policy and sends what it learns from: the whole of a loop's part, in two lines.

    What is sent when follows from the policy's rule. With `strata` losses are sent at the forward pass, and the step
    waits for the answer and is weighted by it, at an example's first visit too; with some go losses of target examples.
    Contributions, where they are measured, follow after the backward pass, in a request of their own that nothing waits
    for. Each micro-batch and each process asks for its own rows.

    With any other rule weights are the newest known when a step begins; statistics are sent when it ends; the network
    is in between, beside the training. The answer to a step holds the weights of its own rows, for their next visit: in
    the first pass over the data nothing is weighted. With `upcoming` it holds those of the next batch instead, from all
    that every trainer has found out up to now: they are one step old when they are used, or a few on a slow network,
    and at most the client's `max_staleness`.

    A batch may be skipped, by `continue` or an exception, at any point of the block.

    Example:
        >>> direction = TargetDirection(model, example_losses, target_batches)
        >>> steps = WeightedSteps(client, GhostContributions(model, direction))
        >>> for (ids, batch), following in look_ahead(loader):
        ...     with steps.capture(ids, upcoming=following and following[0]) as step:
        ...         step.loss(batch).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> steps.submit()

    Args:
        client: a `PolicyClient`.
        contributions: how they are found: any method but `OnePassContributions`, which weighs in the same step.
        accumulate: micro-batches to an optimizer's step: each loss is divided by it, and their statistics are sent
            together; earlier where the parameters have moved. None: the loop scales losses itself and calls `submit`.
        accelerator: an `accelerate.Accelerator`, which scales losses, and says when statistics are sent.
        sampled: the examples come from a `WeightedSampler` or `Mixture`, so that losses are not weighted again.
        measure_every: contributions are measured of every k-th batch, or micro-batch, alone. With `strata` losses are
            sent of all, and 0 measures none; with any other rule nothing is sent of the others, so that it needs
            `sampled`.
        compare_every: before every k-th batch, or micro-batch, the losses of target examples are measured, by a forward
            pass, and sent with those of the batch: for `strata`. 0: never. See `TargetLosses`.
        measure_from: the first batch that is measured, from 0: before some frequencies are learned, contributions of
            text say little.
        measure_until: from this batch on none is measured: what was found out stays, and costs nothing more. None:
            there is no end.
        guard_every: batches between two losses on guard B from `measure_until` on, for the policy's guard; before there
            is none, since weights that are still being learned are not to be judged. None: one at each refresh of the
            direction, so none after `measure_until`.
        relative: contributions are sent relative to the rows that they are sent with, those of this process's step, and
            smaller by what chance explains between rows of different ids: see `relative` and `shrunk`. For ids that
            stand for sources or other groups, and for text; not for `strata`, which compares by itself, nor for
            `trajectory`, whose weights move by plain ones. The policy's SIM is then of what is sent, with a mean near
            0; `policy/plain_sim` is logged of plain ones.
        verify: whether the first step's first four examples are compared with gradients of their own, at a backward
            pass for each.

    Attributes:
        client: the client that is in use: after `resume` from an older checkpoint that of a fork.
        batches: how many were begun, or micro-batches: what is measured follows from it. `state` holds it; a loop with
            checkpoints of its own keeps it, and sets it before the first step.
        schedule: which of them are measured.
        discarded: batches of which nothing was sent because they were skipped, failed or were discarded.

    Raises:
        CaptureError: the method makes a backward pass of its own, or an argument breaks a rule.
    """

    def __init__(
        self,
        client: Policy,
        contributions: Contributions[Any],
        *,
        accumulate: int | None = 1,
        accelerator: Accumulating | None = None,
        sampled: bool = False,
        measure_every: int = 1,
        compare_every: int = 0,
        measure_from: int = 0,
        measure_until: int | None = None,
        guard_every: int | None = None,
        relative: bool = False,
        verify: bool = True,
    ) -> None:
        if isinstance(contributions, OnePassContributions):
            raise CaptureError(
                "contributions = OnePassContributions: makes its own backward pass, under weights of the same step: "
                "use its capture with `client.step`"
            )
        if accumulate is not None and accumulate < 1:
            raise CaptureError(f"accumulate = {accumulate}: must be at least 1")
        if accelerator is not None and accumulate not in (1, None):
            raise CaptureError(f"accumulate = {accumulate}: must not be given beside accelerator, which knows it")
        if isinstance(contributions, LossesAlone) and measure_every:
            raise CaptureError(f"measure_every = {measure_every}: must be 0 with LossesAlone, which measures none")
        if relative and isinstance(contributions, SketchContributions):
            raise CaptureError("relative = True: SketchContributions leave it to the server to find contributions")
        if relative and not measure_every:
            raise CaptureError("relative = True: is for contributions, and measure_every = 0 measures none")
        try:
            self.schedule = Schedule(
                every=measure_every,
                compare_every=compare_every,
                start=measure_from,
                until=measure_until,
                guard_every=guard_every,
            )
        except InvalidRequestError as error:
            raise CaptureError(str(error)) from None
        if guard_every is not None:
            contributions.direction.leave_out_guard()
        self.client = client
        self.contributions = contributions
        self.batches = 0
        self.discarded = 0
        self._accumulate = None if accelerator is not None else accumulate
        self._accelerator = accelerator
        self._sampled = sampled
        self._relative = relative
        self._target: TargetLosses | None = None
        if compare_every:
            self._target = TargetLosses(contributions.direction, every=compare_every, guard=guard_every is None)
        self._losses_first: bool | None = None
        self._open: WeightedStep | None = None
        self._taken: list[WeightedStep] = []
        self._parameters_seen: int | None = None
        self._told = self._skipped = self._ever = False
        self._metrics = Metrics(contributions, sampled=sampled)
        if verify:
            contributions.verify_first()

    @property
    def scale(self) -> float:
        """What a micro-batch's mean loss is multiplied by."""
        return 1.0 if self._accumulate is None else 1.0 / self._accumulate

    def capture(
        self, ids: ArrayLike, *, groups: ArrayLike | None = None, upcoming: ArrayLike | None = None
    ) -> WeightedStep:
        """A step on one batch, to be used as `with steps.capture(ids) as step:`.

        Args:
            ids: the example of each row: integers [B], a tensor, an array or a list.
            groups: the group of each row's example, such as its label or source: integers [B], for rule `strata`.
            upcoming: the examples of the next batch, if known: `look_ahead` tells them. Of no use, and left out, where
                losses come first.
        """
        return self._next(ids, groups, upcoming)

    def begin(self, ids: ArrayLike | None = None) -> WeightedStep:
        """Begins a step without a `with` block: call its `end` after the backward pass.

        A step that was begun before and has no backward pass is discarded.

        Args:
            ids: the example of each row, [B]; None: they come with the losses.
        """
        self._leave_open()
        self._open = self._next(ids, None, None).__enter__()
        return self._open

    def weights(self, ids: NDArray[np.uint64]) -> NDArray[np.float32]:
        """The weights that losses get: float32 [B]."""
        if self._metrics.known is None:
            knows = getattr(self.client, "knows", None)
            self._metrics.known = knows is None or bool(knows(ids).any())
        return np.ones(len(ids), np.float32) if self._sampled else self.client.weights(ids)

    def ask(self, step: WeightedStep) -> NDArray[np.float32]:
        """Sends the losses of a step, and waits for the weights that the policy gives for them: float32 [B]."""
        client: Any = self.client
        ids, fields = step.capture.ids, step.capture.loss_fields()
        if step.groups is not None:
            fields["groups"] = step.groups
        if self._target is not None:
            fields |= (of_target := self._target.take())
            self._metrics.note_target(of_target)
        if self._sampled:
            fields["omit_weights"] = True
            self.client.submit(ids, **fields)
            return np.ones(len(ids), np.float32)
        weights: NDArray[np.float32] = client.step(ids, **fields).weights
        return weights

    def take(self, step: WeightedStep | None) -> None:
        """A micro-batch is over: its statistics are sent, or wait for those of others; None: nothing is known of it."""
        self._open = None
        self._parameters_seen = self._parameters_version()
        if step is None:
            self.discarded += 1
        else:
            self._taken.append(step)
            self._ever = True
        if self._accelerator is not None:
            complete = self._accelerator.sync_gradients
        else:
            complete = self._accumulate is not None and len(self._taken) >= self._accumulate
        if complete:
            self.submit()

    def note_skipped(self) -> None:
        """A batch has no backward pass: said once."""
        self._skipped = True
        if not self._told:
            self._told = True
            logger.warning(
                "a batch has no backward pass: nothing of it is sent, and it is counted in `WeightedSteps.discarded`; "
                "it is said once"
            )

    def submit(self, *, step: int | None = None) -> None:
        """Sends what was captured since the last time, if anything, and does not wait.

        Args:
            step: the training step; informational.
        """
        taken, self._taken = self._taken, []
        if not taken:
            return
        sent = [one for one in taken if one.measured]
        fields = StepFields()
        if sent:
            ids, fields = self._statistics(sent)
            if step is not None:
                fields["step"] = step
            self.client.submit(ids, **fields)
        weights = [one.weights for one in taken]
        self._metrics.note(self.client, fields, np.concatenate(weights))
        plain = [(self._plain(one), one.weights) for one in sent]
        looked_at = [(c.double().cpu().numpy(), w) for c, w in plain if c is not None]
        if looked_at:
            self._metrics.note_plain(*(np.concatenate(parts) for parts in zip(*looked_at, strict=True)))

    def metrics(self) -> dict[str, float]:
        """How the policy does, by name, for a logger: what is known, without waiting for the network.

        Weights, rows and losses are those of this process's newest step, counts those of all its steps; what the server
        says of the whole policy is some seconds old, and missing until it has answered. See `Metrics`.
        """
        return {**self._metrics.values(self.client), "policy/batches_discarded": float(self.discarded)}

    def progress(self) -> str:
        """A line for people: whether the policy helps, and how."""
        return self._metrics.line(self.client)

    def state(
        self, *, sampler: WeightedSampler | Mixture | None = None, trained: int | None = None, keep: int | None = 3
    ) -> dict[str, Any]:
        """What belongs into the trainer's checkpoint; see `run_state`."""
        if self._taken and self._moved():
            self.submit()
        if self._target is not None:
            self._target.restart()
        client: Any = self.client
        direction = self.contributions.direction
        state = run_state(client, direction=direction, sampler=sampler, trained=trained, keep=keep)
        return state | {"batches": self.batches}

    def resume(self, state: Mapping[str, Any], *, sampler: WeightedSampler | Mixture | None = None) -> PolicyClient:
        """Goes on from a checkpoint, before the first step, with the client that it returns; see `resume_run`."""
        client: Any = self.client
        self.batches = state.get("batches", 0)
        self.client = resumed = resume_run(client, state, direction=self.contributions.direction, sampler=sampler)
        return resumed

    def close(self) -> None:
        """The training is over, or was interrupted: what was trained on is sent, and no hook stays on the model."""
        self._leave_open()
        if self._taken and self._moved():
            self.submit()
        self._taken.clear()
        logger.info("%s", self.progress())

    def _statistics(self, taken: list[WeightedStep]) -> tuple[NDArray[np.uint64], StepFields]:
        """What is told of steps after their backward passes: without the losses, where these came first."""
        first = taken[0].capture
        ids, fields = (first.ids, first.fields()) if len(taken) == 1 else join(*(one.capture for one in taken))
        if self._relative:
            fields["contributions"] = compared(ids, fields)
        if taken[0].losses_first:
            del fields["losses"]
            fields["omit_weights"] = True
            return ids, fields
        groups = [one.groups for one in taken if one.groups is not None]
        if groups:
            fields["groups"] = np.concatenate(groups)
        upcoming = [np.asarray(one.upcoming) for one in taken if one.upcoming is not None]
        if upcoming:
            fields["weights_for"] = np.concatenate(upcoming)
        return ids, fields

    def _next(self, ids: ArrayLike | None, groups: ArrayLike | None, upcoming: ArrayLike | None) -> WeightedStep:
        if self._skipped and not self._ever and self._moved():
            raise CaptureError(
                "the model is trained, and no step knows of it: call `.backward()` within the block, on what "
                "`step.loss(batch)` or `step.weigh(losses)` gives; or `step.discard()` where a batch is not weighed"
            )
        if self._taken and self._accumulate is not None and self._moved():
            self.submit()  # of an optimizer's step: the last micro-batches of an epoch are fewer
        measuring = not self.schedule.is_over(self.batches)
        if measuring and self._ever and not self.contributions.direction.ready and self._moved():
            raise CaptureError(
                "norm_matched: the parameters have moved, and no step of a torch.optim.Optimizer was seen, after which "
                "gradients are read: call `direction.note_gradients()` before `.grad` is cleared, or give "
                "TrainingOptions(norm_matched=False)"
            )
        losses_first = self._find_losses_first()
        schedule, batch, ways = self.schedule, self.batches, self.contributions
        self.batches += 1  # whether they are skipped or not, so that processes measure together
        if schedule.hears(batch):
            self._hear_guard()
        if self._target is not None:
            self._target.advance()
        measured, last = schedule.measures(batch), schedule.is_over(batch)
        return WeightedStep(
            self,
            ways.capture(ids) if measured else ways.capture_losses(ids, last=last),
            groups=groups,
            upcoming=upcoming,
            losses_first=losses_first,
            measured=measured,
        )

    def _find_losses_first(self) -> bool:
        """Whether the policy's rule gives weights for losses; not, while nobody can say what rule it is."""
        if self._losses_first is not None or self._taken:  # what is sent together was begun alike
            return bool(self._losses_first)
        rule = rule_of(self.client)
        check_told_enough(rule, self.schedule, sampled=self._sampled)
        if rule is None:
            return False
        self._losses_first = rule in LOSSES_FIRST
        return self._losses_first

    def _hear_guard(self) -> None:
        """The loss on guard B is sent by itself."""
        direction = self.contributions.direction
        loss = direction.measure_guard()
        if loss is not None and direction.is_usable("guard_loss", loss):
            self.client.submit(None, guard_loss=loss, omit_weights=True)
            self._metrics.note_target({"guard_loss": loss})

    def _plain(self, step: WeightedStep) -> Tensor | None:
        """Plain contributions of a measured step, where others were sent; None: they were not looked at."""
        if self._relative and not self.contributions.direction.norm_matched:
            return step.capture.contributions
        return step.capture.plain_contributions

    def _leave_open(self) -> None:
        step, self._open = self._open, None
        if step is not None:
            step.end()

    def _moved(self) -> bool:
        """Whether the parameters were changed since the newest micro-batch."""
        return self._parameters_seen != self._parameters_version()

    def _parameters_version(self) -> int:
        return sum(p._version for p in self.contributions.model.parameters() if p.requires_grad)
