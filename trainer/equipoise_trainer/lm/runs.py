"""One run: a method, a seed, a learning rate. It goes on from its checkpoint, and equals one that never stopped."""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from equipoise import PolicySpec
from equipoise.torch import perplexity_buckets
from equipoise_trainer.analysis import detection_auroc
from equipoise_trainer.lm.costs import Meter
from equipoise_trainer.lm.learner import Learner, LearnerConfig
from equipoise_trainer.lm.methods import METHODS, Method
from equipoise_trainer.lm.policy import RunPolicy
from equipoise_trainer.lm.recipes import SOURCES, TextTask
from equipoise_trainer.lm.records import Curve, RunRecord
from equipoise_trainer.lm.reference import reference_losses
from equipoise_trainer.lm.served import LossSteps, MixedSteps, ScoredSteps, SelectedSteps
from equipoise_trainer.lm.steps import Made, PlainSteps, Steps, Surroundings, TrimmedSteps


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """What a run is.

    Attributes:
        method: name of its method.
        seed: of the model and the order; the task has its own.
        learning_rate: of AdamW.
        steps: T.
        batch_size: B.
        log_every: steps between two measurements.
        checkpoint_every: steps between two checkpoints.
        policy: name of the policy, if the method has one: a fresh one for each attempt.
        moves: [T], norms that the moves are scaled to; None: as AdamW makes them.
    """

    method: str
    seed: int
    learning_rate: float
    steps: int
    batch_size: int
    log_every: int
    checkpoint_every: int
    policy: str = ""
    moves: tuple[float, ...] | None = None


def execute(
    plan: RunPlan,
    task: TextTask,
    *,
    address: str,
    checkpoint: Path,
    on_step: Callable[[int], None] | None = None,
) -> RunRecord:
    """Runs to the end, from the checkpoint if there is one, and removes it.

    Args:
        plan: what.
        task: on what.
        address: `host:port` of the policy server; not used by methods without a rule.
        checkpoint: file for checkpoints; the policy goes beside it.
        on_step: called after each step with the number of steps done.

    Raises:
        equipoise.EquipoiseError: the server refused something, or cannot be reached.
    """
    saved = torch.load(checkpoint, weights_only=False) if checkpoint.is_file() else None
    run = _Run(plan, task, checkpoint=checkpoint)
    with run.policy(address, saved=saved) as policy:
        record = run.execute(policy, saved=saved, on_step=on_step)
    for path in (checkpoint, _archive(checkpoint, saved)):
        path.unlink(missing_ok=True)
    for path in checkpoint.parent.glob(f"{checkpoint.stem}-*.npz"):
        path.unlink()
    return record


class _Run:
    def __init__(self, plan: RunPlan, task: TextTask, *, checkpoint: Path) -> None:
        self._plan = plan
        self._task = task
        self._checkpoint = checkpoint
        self._method: Method = METHODS[plan.method]
        self._config = LearnerConfig(preset=task.config.preset, seed=plan.seed, learning_rate=plan.learning_rate)
        self._learner = Learner(self._config)
        self._around = Surroundings(
            task=task, learner=self._learner, meter=Meter(), batch_size=plan.batch_size, seed=plan.seed
        )
        self._groups = _groups(self._method, task)
        self._curve = Curve()
        self._moves: list[float] = []
        self._masses = np.zeros(len(SOURCES))

    @contextmanager
    def policy(self, address: str, *, saved: dict[str, Any] | None) -> Iterator[RunPolicy | None]:
        """The policy of the run, as it was at the checkpoint; None: the method has none."""
        if not self._method.rule:
            yield None
            return
        spec = PolicySpec(
            name=self._plan.policy,
            num_examples=len(self._task.train) if self._groups is None else int(self._groups.max()) + 1,
            rule=self._method.rule,
            settings=self._method.settings,
            reference_nats=math.log(self._task.config.preset.vocabulary),
        )
        archive = None if saved is None else _archive(self._checkpoint, saved)
        with RunPolicy(address, spec=spec, archive=archive) as policy:
            yield policy

    def execute(
        self, policy: RunPolicy | None, *, saved: dict[str, Any] | None, on_step: Callable[[int], None] | None
    ) -> RunRecord:
        """From the first step, or the checkpoint's, to the last."""
        plan, started = self._plan, time.monotonic()
        before = 0.0 if saved is None else float(saved["seconds"])
        reference = None if saved is None else saved["reference"]
        if self._method.name == "rho" and reference is None:
            reference = reference_losses(self._around, self._config)
        steps = self._steps(policy, reference)
        first = 0 if saved is None else self._load(saved, steps)
        for step in range(first, plan.steps):
            if step % plan.checkpoint_every == 0 and step > first:
                self._save(step, steps, policy, reference, seconds=before + time.monotonic() - started)
            if step % plan.log_every == 0:
                self._measure(step)
            self._note(steps.make(step))
            self._moves.append(self._learner.step(step, length=None if plan.moves is None else plan.moves[step]))
            if on_step is not None:
                on_step(step + 1)
        self._measure(plan.steps)
        return self._record(policy, seconds=before + time.monotonic() - started)

    def _steps(self, policy: RunPolicy | None, reference: NDArray[np.float64] | None) -> Steps:
        around, method, groups = self._around, self._method, self._groups
        if method.kind == "trim":
            return TrimmedSteps(around)
        if policy is None:
            return PlainSteps(around, data=method.data)
        if method.kind == "losses":
            return LossSteps(around, policy, reference=reference)
        if method.kind == "candidates":
            return SelectedSteps(around, policy)
        if groups is None:
            return ScoredSteps(around, policy)
        return MixedSteps(around, policy, groups=groups)

    def _note(self, made: Made) -> None:
        sources = self._task.sources[made.ids]
        self._masses += np.bincount(sources, weights=made.weights, minlength=len(SOURCES))

    def _measure(self, step: int) -> None:
        total = float(self._masses.sum())
        self._curve.step.append(step)
        self._curve.units.append(self._around.meter.units(self._plan.batch_size))
        self._curve.guard_loss.append(self._learner.measure(self._task.guard))
        self._curve.test_loss.append(self._learner.measure(self._task.test))
        self._curve.shares.append((self._masses / total).tolist() if total else None)
        self._masses[:] = 0.0

    def _record(self, policy: RunPolicy | None, *, seconds: float) -> RunRecord:
        auroc, shares, facts = None, None, None
        if policy is not None:
            facts = asdict(policy.facts())
            weights, scores = policy.table()
            if self._groups is not None:
                weights, scores = weights[self._groups], scores[self._groups]
            if np.isfinite(scores).any():
                masses = np.bincount(self._task.sources, weights=weights, minlength=len(SOURCES))
                shares = (masses / masses.sum()).tolist()
                area = detection_auroc(scores, self._task.noisy)
                auroc = None if math.isnan(area) else area
        return RunRecord(
            method=self._plan.method,
            seed=self._task.config.seed,
            learning_rate=self._plan.learning_rate,
            curve=self._curve,
            moves=self._moves,
            counts=self._around.meter.to_dict(),
            seconds=seconds,
            auroc=auroc,
            table_shares=shares,
            facts=facts,
        )

    def _save(
        self,
        step: int,
        steps: Steps,
        policy: RunPolicy | None,
        reference: NDArray[np.float64] | None,
        *,
        seconds: float,
    ) -> None:
        """Writes a checkpoint; the policy is written before what names it, so that the two always fit."""
        state = {
            "step": step,
            "learner": self._learner.state_dict(),
            "steps": steps.state(),
            "meter": self._around.meter.to_dict(),
            "curve": asdict(self._curve),
            "moves": list(self._moves),
            "masses": self._masses.copy(),
            "reference": reference,
            "seconds": seconds,
        }
        if policy is not None:
            policy.save(_archive(self._checkpoint, state))
        part = self._checkpoint.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, self._checkpoint)

    def _load(self, saved: dict[str, Any], steps: Steps) -> int:
        self._learner.load_state_dict(saved["learner"])
        steps.load(saved["steps"])
        for name, count in saved["meter"].items():
            setattr(self._around.meter, name, count)
        self._curve = Curve(**saved["curve"])
        self._moves = list(saved["moves"])
        self._masses = saved["masses"].copy()
        return int(saved["step"])


def _archive(checkpoint: Path, state: dict[str, Any] | None) -> Path:
    """Where the policy of a checkpoint lies."""
    return checkpoint.with_name(f"{checkpoint.stem}-{0 if state is None else state['step']}.npz")


def _groups(method: Method, task: TextTask) -> NDArray[np.int64] | None:
    """Id of each training sequence in the policy; None: its own."""
    if method.ids == "sequences":
        return None
    if method.ids == "sources":
        return np.unique(task.sources, return_inverse=True)[1].astype(np.int64)
    return perplexity_buckets(list(task.train))
