"""Steps whose weights a policy server gives.

Contributions are sent relative to their mean over the batch. What all text shares, such as how frequent tokens are,
dominates the plain ones; its sign swings with every few steps of the model, and a direction some steps old then calls
everything harmful or everything useful. Relative ones ask what a policy must know: does a sequence do more for the
target than the usual one? They are sent in units of their spread and cut off, since under Adam's scaling a single rare
token can outweigh a hundred sequences. Where the groups of a batch differ by no more than chance would have it,
nothing is sent: data without any fault keep their weights.

Shape legend: B sequences of a step, N ids of the policy.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from equipoise.torch import OnePassContributions, TargetDirection
from equipoise.torch.one_pass import OnePassCapture
from equipoise.wire import StepFields
from equipoise_trainer.lm.model import sequence_losses
from equipoise_trainer.lm.policy import Array, RunPolicy
from equipoise_trainer.lm.steps import Made, Steps, Surroundings

CANDIDATES: Final = 2
"""How many times B are scored for one batch by `SelectedSteps`."""
NEVER: Final = 10**9
FARTHEST: Final = 2.0
"""Where relative contributions are cut off, in spreads."""
NORMAL_SPREAD: Final = 1.4826


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """When a policy learns.

    Attributes:
        start: the first so many steps are plain: contributions say little before frequencies of tokens are learned.
        until: no step is scored from here on; None: there is no end.
        every: steps from one that is scored to the next.
        oldest: a direction of so many steps ago is refreshed before it is used.
        target_batches: how many batches of target A one refresh takes, in turn; None: all.
        momentum: what a refresh keeps of the direction: see `TargetDirection`.
        guard_every: steps between two losses on B after `until`; None: one at each refresh.
    """

    start: int = 20
    until: int | None = None
    every: int = 1
    oldest: int = 10
    target_batches: int | None = None
    momentum: float = 0.0
    guard_every: int | None = None

    def scores(self, step: int) -> bool:
        """Whether the sequences of a step are scored."""
        learns = step >= self.start and (self.until is None or step < self.until)
        return learns and (step - self.start) % self.every == 0

    def hears(self, step: int) -> bool:
        """Whether the loss on B is measured for its own sake before a step."""
        if self.guard_every is None or self.until is None or step < self.until:
            return False
        return (step - self.until) % self.guard_every == 0


def relative(values: Array) -> Array:
    """Distances from the median in units of the spread, cut off at `FARTHEST`, with mean 0: [B].

    The unit is what the median absolute deviation of a normal distribution is multiplied with to give its standard
    deviation; without any spread all are 0.
    """
    distances = values - np.median(values)
    spread = NORMAL_SPREAD * np.median(np.abs(distances))
    if not spread > 0:
        return np.zeros_like(values)
    cut = np.clip(distances / spread, -FARTHEST, FARTHEST)
    centred: Array = cut - cut.mean()
    return centred


def shrunk(values: Array, groups: NDArray[np.int64]) -> Array:
    """Values made smaller by the share of what parts their groups' means that chance within the groups explains: [B].

    With F the ratio of the mean squares between groups and within them, the factor is 1 - 1/F, and 0 where F is below
    1 (positive-part James-Stein). Rows that are all of one group, or each of their own, say nothing of chance and stay.
    """
    found, place, counts = np.unique(groups, return_inverse=True, return_counts=True)
    if not 1 < len(found) < len(values):
        return values
    means = np.bincount(place, weights=values) / counts
    between = float((counts * np.square(means - values.mean())).sum()) / (len(found) - 1)
    within = float(np.square(values - means[place]).sum()) / (len(values) - len(found))
    return values * (max(0.0, 1.0 - within / between) if between > 0 else 0.0)


class LossSteps(Steps):
    """Weights from losses, in the same step: between the forward and the backward pass."""

    def __init__(self, around: Surroundings, policy: RunPolicy, *, reference: NDArray[np.float64] | None) -> None:
        self._around = around
        self._policy = policy
        self._reference = reference
        self._batches = around.batches(len(around.task.train))

    def make(self, step: int) -> Made:
        """The weighted mean loss of the batch."""
        around = self._around
        ids = self._batches.at(step)
        losses = around.learner.losses(around.task.train[ids])
        fields: StepFields = {"losses": losses.detach().numpy(), "step": step}
        if self._reference is not None:
            fields["reference_losses"] = self._reference[ids].astype(np.float32)
        weights = self._policy.step(ids, **fields)
        (torch.from_numpy(weights).to(losses) * losses).mean().backward()  # type: ignore[no-untyped-call]
        around.meter.plain += len(ids)
        return Made(ids=ids, weights=weights)


class ScoredSteps(Steps):
    """Weights from contributions, in the same step, where the schedule has sequences scored; else plain steps.

    Args:
        around: the run.
        policy: its policy.
        groups: id of each training sequence in the policy; None: its own.
        schedule: when sequences are scored.
    """

    def __init__(
        self, around: Surroundings, policy: RunPolicy, *, groups: NDArray[np.int64] | None, schedule: Schedule
    ) -> None:
        task, learner = around.task, around.learner
        self._around = around
        self._policy = policy
        self._groups = np.arange(len(task.train)) if groups is None else groups
        self._schedule = schedule
        self._batches = around.batches(len(task.train))
        targets = list(torch.split(torch.from_numpy(task.target), around.batch_size))
        self._direction = TargetDirection(
            learner.model,
            sequence_losses,
            targets,
            refresh_every=NEVER,
            preconditioner=learner.optimizer,
            guard_batches=None if schedule.guard_every else [torch.from_numpy(task.guard)],
            batches_per_refresh=schedule.target_batches,
            momentum=schedule.momentum,
        )
        taken = schedule.target_batches or len(targets)
        self._refresh_rows = sum(len(batch) for batch in targets[:taken])
        self._one_pass = OnePassContributions(learner.model, self._direction, shared=["positions"])
        self._refreshed_at = -NEVER

    def make(self, step: int) -> Made:
        """The weighted mean loss of a scored batch, or the mean loss of a plain one."""
        if self._schedule.hears(step):
            self._policy.hear(self._around.learner.measure(self._around.task.guard), step=step)
            self._around.meter.forward += len(self._around.task.guard)
        if self._schedule.scores(step):
            return self._scored(step, self._batches.at(step))
        return self._plain(self._unscored(step))

    def state(self) -> dict[str, Any]:
        """The direction, and how old it is."""
        direction = self._direction.state_dict() if self._direction.vectors else None
        return {"direction": direction, "refreshed_at": self._refreshed_at}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken."""
        if state["direction"] is not None:
            self._direction.load_state_dict(state["direction"])
        self._refreshed_at = state["refreshed_at"]

    def _unscored(self, step: int) -> NDArray[np.int64]:
        """The sequences of a step that is not scored."""
        return self._batches.at(step)

    def _plain(self, ids: NDArray[np.int64]) -> Made:
        around = self._around
        around.learner.losses(around.task.train[ids]).mean().backward()  # type: ignore[no-untyped-call]
        around.meter.plain += len(ids)
        return Made(ids=ids, weights=np.ones(len(ids)))

    def _scored(self, step: int, ids: NDArray[np.int64]) -> Made:
        with self._capture(step, ids) as capture:
            weights = self._weigh(step, ids, capture)
            capture.backward(weights)
        return Made(ids=ids, weights=weights)

    def _weigh(self, step: int, ids: NDArray[np.int64], capture: OnePassCapture) -> Array:
        """Forward pass, contributions, and the weights that answer them."""
        around = self._around
        capture.losses(torch.from_numpy(around.task.train[ids]))
        around.meter.one_pass += len(ids)
        fields = capture.fields()
        groups = self._groups[ids]
        values = relative(np.asarray(fields["contributions"], dtype=np.float64))
        fields["contributions"] = shrunk(values, groups).astype(np.float32)
        fields["step"] = step
        return self._policy.step(groups, **fields)

    def _capture(self, step: int, ids: NDArray[np.int64]) -> OnePassCapture:
        refreshes = step - self._refreshed_at >= self._schedule.oldest
        if refreshes:
            self._direction.refresh()
            self._refreshed_at = step
            self._around.meter.plain += self._refresh_rows
            if not self._schedule.guard_every:
                self._around.meter.forward += len(self._around.task.guard)
        capture = self._one_pass.capture(self._groups[ids])
        if refreshes:
            capture.note_losses()
        return capture


class ExploringSteps(ScoredSteps):
    """For a while batches of all sequences alike are scored; all others are drawn by weight, and not scored.

    No time is spent on what has no weight, and none on scoring what is known. The sequences of a group come in turn.
    Scored batches are trained on with equal weights: a model that no longer sees what has lost its weight would find it
    useful again, for what all text shares.
    """

    def __init__(
        self, around: Surroundings, policy: RunPolicy, *, groups: NDArray[np.int64], schedule: Schedule
    ) -> None:
        super().__init__(around, policy, groups=groups, schedule=schedule)
        random = np.random.default_rng(around.seed)
        self._members = [random.permutation(np.flatnonzero(groups == group)) for group in range(int(groups.max()) + 1)]
        self._turns = np.zeros(len(self._members), dtype=np.int64)

    def state(self) -> dict[str, Any]:
        """The direction, and whose turn it is in each group."""
        return {**super().state(), "turns": self._turns.copy()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken."""
        super().load(state)
        self._turns = state["turns"].copy()

    def _scored(self, step: int, ids: NDArray[np.int64]) -> Made:
        with self._capture(step, ids) as capture:
            self._weigh(step, ids, capture)
            equal = np.ones(len(ids))
            capture.backward(equal)
        return Made(ids=ids, weights=equal)

    def _unscored(self, step: int) -> NDArray[np.int64]:
        if step < self._schedule.start:
            return self._batches.at(step)
        seed = int(np.random.default_rng((self._around.seed, step)).integers(2**62))
        drawn = self._policy.sample(self._around.batch_size, seed=seed)
        ids = np.empty(len(drawn), dtype=np.int64)
        for place, group in enumerate(drawn.tolist()):
            members = self._members[group]
            ids[place] = members[self._turns[group] % len(members)]
            self._turns[group] += 1
        return ids


class SelectedSteps(ScoredSteps):
    """Of `CANDIDATES`·B sequences, all scored, B are drawn by weight and trained on (as OPUS draws its batches)."""

    def __init__(self, around: Surroundings, policy: RunPolicy, *, schedule: Schedule) -> None:
        super().__init__(around, policy, groups=None, schedule=schedule)
        self._candidates = around.batches(len(around.task.train), batch_size=CANDIDATES * around.batch_size)

    def _scored(self, step: int, ids: NDArray[np.int64]) -> Made:
        ids = self._candidates.at(step)
        with self._capture(step, ids) as capture:
            weights = self._weigh(step, ids, capture)
            random = np.random.default_rng((self._around.seed, step))
            chosen = random.choice(len(ids), self._around.batch_size, replace=False, p=weights / weights.sum())
            counted = np.zeros(len(ids))
            counted[chosen] = CANDIDATES
            capture.backward(counted)
        return Made(ids=ids, weights=counted)
