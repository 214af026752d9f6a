"""Training jobs that are small and real: each learns a classifier under a policy, some of whose labels are wrong."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from equipoise import PolicyClient, Security
from equipoise.options import ClientMetrics
from equipoise.policies import SettingValue
from equipoise.wire import StepFields
from equipoise_server.rules import names

NUM_EXAMPLES, NUM_FEATURES, NUM_TARGETS = 512, 32, 128
ROWS = 20
"""Of a trajectory."""
LOSSES_ALONE = ("excess_loss", "exp3", "group_dro", "group_softmax", "loss_linear_upper", "rho")
"""Rules that read losses and no contributions."""
ATTEMPTS = 8
"""At each example, for the rule that reads outcomes."""

SETTINGS: Mapping[str, Mapping[str, SettingValue]] = {
    "trajectory": {"rows": ROWS, "learning_rate": 3e-4},
    "projected_gradient": {"step_size": 0.05},
}
"""What rules need beside their defaults."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training job.

    Attributes:
        policy: it trains.
        rule: of the policy.
        settings: of the rule.
        batch: rows of a step.
        guards: whether it reports a guard loss.
        outliers: whether one row of each step contributes far more than all others, as a copy of a target does.
        pause_s: between two steps.
    """

    policy: str
    rule: str
    settings: Mapping[str, SettingValue] = field(default_factory=dict)
    batch: int = 64
    guards: bool = True
    outliers: bool = False
    pause_s: float = 0.1


COLLAPSED = Job(policy="run-collapsed", rule="boltzmann", settings={"temperature": 0.01}, guards=False, outliers=True)
"""So cold that the outlier of a batch has all the weight."""


def jobs() -> tuple[Job, ...]:
    """One for every rule, and one whose policy has collapsed."""
    every = (
        Job(policy=f"run-{name.replace('_', '-')}", rule=name, settings=SETTINGS.get(name, {})) for name in names()
    )
    return (*every, COLLAPSED)


class Classifier:
    """Logistic regression on examples of which a fifth have the wrong label, with targets and guards that are right."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        truth = self.random.normal(size=NUM_FEATURES)
        self._inputs = self.random.normal(size=(NUM_EXAMPLES, NUM_FEATURES))
        self._labels = (self._inputs @ truth > 0) ^ (self.random.random(NUM_EXAMPLES) < 0.2)
        self._held = self.random.normal(size=(2, NUM_TARGETS, NUM_FEATURES))  # targets, guards
        self._held_labels = self._held @ truth > 0
        self.model = np.zeros(NUM_FEATURES)

    def gradients(self, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """Of each example's loss, [B, features]."""
        errors = _chances(self._inputs[ids] @ self.model) - self._labels[ids]
        return np.asarray(errors[:, None] * self._inputs[ids])

    def statistics(self, job: Job, ids: NDArray[np.int64], gradients: NDArray[np.float64]) -> StepFields:
        """What the rule of a job may ask for, of some examples."""
        errors = _chances(self._held[0] @ self.model) - self._held_labels[0]
        contributions = gradients @ (errors @ self._held[0] / NUM_TARGETS)
        if job.outliers:
            contributions[0] = 10 * np.abs(contributions).max()
        losses = _losses(self._inputs[ids] @ self.model, self._labels[ids])
        fields = StepFields(target_loss=float(_losses(self._held[0] @ self.model, self._held_labels[0]).mean()))
        if job.guards:
            fields["guard_loss"] = float(_losses(self._held[1] @ self.model, self._held_labels[1]).mean())
        if job.rule == "learnability":
            fields["attempts"] = np.full(len(ids), ATTEMPTS)
            fields["successes"] = self.random.binomial(ATTEMPTS, np.exp(-losses))
        elif job.rule in LOSSES_ALONE:
            fields["losses"] = losses
        else:
            fields["contributions"] = contributions
        if job.rule == "strata":
            fields["losses"] = losses
        if job.rule in ("excess_loss", "rho"):
            fields["reference_losses"] = np.full(len(ids), 0.3)
        return fields


class Training(threading.Thread):
    """A job that runs until it is stopped."""

    def __init__(
        self,
        job: Job,
        address: str,
        *,
        metrics: ClientMetrics | None = None,
        security: Security | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(name=job.policy, daemon=True)
        self.job = job
        self._classifier = Classifier(seed)
        self._stopped = threading.Event()
        self._client = PolicyClient(
            address,
            policy=job.policy,
            num_examples=NUM_EXAMPLES,
            rule=job.rule,
            settings=job.settings,
            reference_nats=float(np.log(2)),
            metrics=metrics,
            security=security,
        )

    def run(self) -> None:
        """Trains."""
        number = 0
        with self._client as client:
            while not self._stopped.wait(self.job.pause_s):
                self._step(client, number)
                number += 1

    @property
    def applied(self) -> int:
        """Steps that the server has applied."""
        return self._client.stats.applied

    def stop(self) -> None:
        """Ends it."""
        self._stopped.set()
        self.join(30)

    def _step(self, client: PolicyClient, number: int) -> None:
        learner, is_searched = self._classifier, self.job.rule == "trajectory"
        every = np.arange(NUM_EXAMPLES)
        ids = every if is_searched else learner.random.integers(0, NUM_EXAMPLES, size=self.job.batch)
        if is_searched and number % ROWS == 0:
            learner.model = np.zeros(NUM_FEATURES)  # the run is replayed
        gradients = learner.gradients(ids)
        fields = learner.statistics(self.job, ids, gradients)
        if is_searched:
            fields["step"] = number % ROWS
        weights = client.step(ids, **fields).weights
        learner.model = learner.model - 0.05 * weights @ gradients / len(ids)


def _chances(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(1 / (1 + np.exp(-logits)))


def _losses(logits: NDArray[np.float64], labels: NDArray[np.bool_]) -> NDArray[np.float64]:
    return np.asarray(np.logaddexp(0, np.where(labels, -logits, logits)))
