"""Steps whose weights a policy server gives.

Contributions are sent relative to their mean over the batch, and smaller by what chance explains between the groups of
a batch: see `equipoise.torch.comparison`. Data without any fault keep their weights.

Shape legend: B sequences of a step, N ids of the policy.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from equipoise.torch import GhostContributions, Mixture, OnePassContributions, TargetDirection, WeightedSteps
from equipoise.torch.comparison import compared
from equipoise.torch.one_pass import OnePassCapture
from equipoise.wire import StepFields
from equipoise_trainer.lm.model import sequence_losses
from equipoise_trainer.lm.policy import Array, RunPolicy
from equipoise_trainer.lm.steps import Made, Steps, Surroundings

START: Final = 20
"""The first so many steps are plain: contributions say little before frequencies of tokens are learned."""
CANDIDATES: Final = 2
"""How many times B are scored for one batch by `SelectedSteps`."""
LEARNED: Final = 44
"""Where few ids stand for all sequences a policy is learned from 12 batches, every second one up to this step. Part of
what sequences do swings with the model and is alike for all of a group: more steps, and an average of directions, help
where more rows do not."""
GUARD_EVERY: Final = 8
"""Steps between two losses on B from then on."""


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
    """Weights from contributions, in the same step, where each sequence has an id of its own.

    Every batch after the first ones is scored: a sequence is visited too rarely to leave one out.
    """

    def __init__(self, around: Surroundings, policy: RunPolicy) -> None:
        self._around = around
        self._policy = policy
        self._batches = around.batches(len(around.task.train))
        targets = _targets(around)
        self._direction = TargetDirection(
            around.learner.model,
            sequence_losses,
            targets,
            refresh_every=10,
            preconditioner=around.learner.optimizer,
            guard_batches=[torch.from_numpy(around.task.guard)],
        )
        self._one_pass = OnePassContributions(around.learner.model, self._direction, shared=["positions"])

    def make(self, step: int) -> Made:
        """The weighted mean loss of a scored batch, or the mean loss of a plain one."""
        ids = self._batches.at(step)
        return self._plain(ids) if step < START else self._scored(step, ids)

    def state(self) -> dict[str, Any]:
        """The direction, which is refreshed at the next step."""
        return {"direction": self._direction.state_dict()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken."""
        self._direction.load_state_dict(state["direction"])

    def _plain(self, ids: NDArray[np.int64]) -> Made:
        around = self._around
        around.learner.losses(around.task.train[ids]).mean().backward()  # type: ignore[no-untyped-call]
        around.meter.plain += len(ids)
        return Made(ids=ids, weights=np.ones(len(ids)))

    def _scored(self, step: int, ids: NDArray[np.int64]) -> Made:
        with self._one_pass.capture(ids) as capture:
            weights = self._weigh(step, ids, capture)
            capture.backward(weights)
        return Made(ids=ids, weights=weights)

    def _weigh(self, step: int, ids: NDArray[np.int64], capture: OnePassCapture) -> Array:
        """Forward pass, contributions, and the weights that answer them."""
        around = self._around
        if capture.refreshed:
            around.meter.plain += len(around.task.target)
            around.meter.forward += len(around.task.guard)
        capture.losses(torch.from_numpy(around.task.train[ids]))
        around.meter.one_pass += len(ids)
        fields = capture.fields()
        fields["contributions"] = compared(capture.ids, fields)
        fields["step"] = step
        return self._policy.step(ids, **fields)


class MixedSteps(Steps):
    """Groups of sequences are the sources of a mixture, whose shares are explored first and then follow the policy.

    No time is spent on what has no weight, and none on scoring what is known. Batches of the exploration are trained on
    with equal weights: a model that no longer sees what has lost its weight would find it useful again, for what all
    text shares.

    Args:
        around: the run.
        policy: its policy.
        groups: the id of each training sequence in the policy.
    """

    def __init__(self, around: Surroundings, policy: RunPolicy, *, groups: NDArray[np.int64]) -> None:
        self._around = around
        targets = _targets(around)
        self._direction = TargetDirection(
            around.learner.model,
            sequence_losses,
            targets,
            refresh_every=1,
            preconditioner=around.learner.optimizer,
            guard_batches=[torch.from_numpy(around.task.guard)],
            batches_per_refresh=1,
            momentum=0.6,
        )
        self._refresh_rows = len(targets[0])
        self._steps = WeightedSteps(
            policy.client,
            GhostContributions(around.learner.model, self._direction, shared=["positions"]),
            sampled=True,
            measure_every=2,
            measure_from=START,
            measure_until=LEARNED,
            guard_every=GUARD_EVERY,
            relative=True,
            verify=False,
        )
        members = [np.flatnonzero(groups == group).tolist() for group in range(int(groups.max()) + 1)]
        self._mixture = Mixture(
            {f"group {group:03d}": sequences for group, sequences in enumerate(members)},
            client=policy.client,
            num_samples=max(1, len(groups) // around.batch_size) * around.batch_size,
            refresh_every=around.batch_size,
            explore=LEARNED * around.batch_size,
            seed=around.seed,
        )
        self._batches = self._drawn()

    def make(self, step: int) -> Made:
        """The mean loss of a batch of the mixture."""
        around, meter = self._around, self._around.meter
        groups, sequences = next(self._batches)
        ids = sequences.numpy()
        if self._steps.schedule.hears(self._steps.batches):
            meter.forward += len(around.task.guard)
        with self._steps.capture(groups) as capture:
            capture.loss(torch.from_numpy(around.task.train[ids])).backward()  # type: ignore[no-untyped-call]
        if capture.measured:
            meter.ghost += len(ids)
        else:
            meter.plain += len(ids)
        if capture.capture.refreshed:
            meter.plain += self._refresh_rows
        return Made(ids=ids, weights=np.ones(len(ids)))

    def state(self) -> dict[str, Any]:
        """Where the mixture stands, the direction, and how many batches there were."""
        return {
            "mixture": self._mixture.state_dict(),
            "direction": self._direction.state_dict(),
            "batches": self._steps.batches,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken."""
        self._mixture.load_state_dict(state["mixture"])
        self._direction.load_state_dict(state["direction"])
        self._steps.batches = state["batches"]

    def _drawn(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Groups and sequences of one batch after another, over all epochs."""
        while True:
            yield from DataLoader(self._mixture.dataset, batch_size=self._around.batch_size, sampler=self._mixture)


class SelectedSteps(ScoredSteps):
    """Of `CANDIDATES`·B sequences, all scored, B are drawn by weight and trained on (as OPUS draws its batches)."""

    def __init__(self, around: Surroundings, policy: RunPolicy) -> None:
        super().__init__(around, policy)
        self._candidates = around.batches(len(around.task.train), batch_size=CANDIDATES * around.batch_size)

    def _scored(self, step: int, ids: NDArray[np.int64]) -> Made:
        ids = self._candidates.at(step)
        with self._one_pass.capture(ids) as capture:
            weights = self._weigh(step, ids, capture)
            random = np.random.default_rng((self._around.seed, step))
            chosen = random.choice(len(ids), self._around.batch_size, replace=False, p=weights / weights.sum())
            counted = np.zeros(len(ids))
            counted[chosen] = CANDIDATES
            capture.backward(counted)
        return Made(ids=ids, weights=counted)


def _targets(around: Surroundings) -> list[Tensor]:
    """Target A in batches of B."""
    return list(torch.split(torch.from_numpy(around.task.target), around.batch_size))
