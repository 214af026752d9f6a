"""The perceptron's studies: which data, and how the policy is searched."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from equipoise_trainer.datasets import PAPER_TRAIN, DatasetConfig, load
from equipoise_trainer.offline.logistic import LogisticProblem, Vector
from equipoise_trainer.offline.planted import Planted, plant
from equipoise_trainer.offline.rows import RowSettings
from equipoise_trainer.reproduction.runs import Experiment
from equipoise_trainer.tasks import Task

PLANT_SEED = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """One experiment, over seeds.

    Attributes:
        name: what it is called in options and folders.
        title: what it is called on the page.
        dataset: `paper` or `paper-noisy`, see `equipoise_trainer.datasets`.
        target_size: M.
        flipped: share of flipped training labels, in [0, 1).
        planted: whether duplicates and easy examples are planted.
        steps: T.
        learning_rate: η of the training runs.
        step_size: ε of the paper's Eq. 6, for its J = Σ_t L_A(θ_t). What the rule gets is η·ε.
        policy_epochs: how often every row is moved.
        warm_up: policy epochs over which the step grows to ε, see `SearchPlan`.
    """

    name: str
    title: str
    dataset: str
    target_size: int
    flipped: float = 0.0
    planted: bool = False
    steps: int
    learning_rate: float = 0.1
    step_size: float
    policy_epochs: int
    warm_up: int = 0

    def __post_init__(self) -> None:
        DatasetConfig(name=self.dataset, seed=0, flipped=self.flipped, target_size=self.target_size)
        if self.dataset not in ("paper", "paper-noisy"):
            raise ValueError(f"dataset: {self.dataset!r}, must be paper or paper-noisy")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate: {self.learning_rate}, must be positive")
        _ = self.rows

    @property
    def rows(self) -> RowSettings:
        """The policy."""
        return RowSettings(
            num_examples=PAPER_TRAIN,
            rows=self.steps,
            policy_epochs=self.policy_epochs,
            learning_rate=self.learning_rate * self.step_size,
        )

    def task(self, seed: int) -> tuple[Task, Planted]:
        """The data of a seed."""
        config = DatasetConfig(name=self.dataset, seed=seed, flipped=self.flipped, target_size=self.target_size)
        task = load(config)
        return plant(task, seed=seed + PLANT_SEED) if self.planted else (task, Planted.of_flips(task.flipped))

    def experiment(self, seed: int) -> Experiment[Vector]:
        """The study on a seed."""
        task, planted = self.task(seed)
        return Experiment(
            problem=LogisticProblem(task, learning_rate=self.learning_rate),
            planted=planted,
            study=self.to_json(),
            seed=seed,
        )

    def to_json(self) -> dict[str, Any]:
        """Its fields by name."""
        return asdict(self)


STUDIES: Final[Mapping[str, Study]] = {
    study.name: study
    for study in (
        Study(
            name="paper-512",
            title="The paper's protocol, M = 512",
            dataset="paper",
            target_size=512,
            steps=2000,
            step_size=1e-4,  # with 33 epochs, ten of them shorter, the same way as the paper's 500 of 5e-6
            policy_epochs=33,
            warm_up=10,
        ),
        Study(
            name="paper-4096",
            title="Clean labels, M = 4096",
            dataset="paper",
            target_size=4096,
            steps=1000,
            step_size=1e-4,
            policy_epochs=150,
            warm_up=10,
        ),
        Study(
            name="noisy-512",
            title="Noisy margins, M = 512",
            dataset="paper-noisy",
            target_size=512,
            steps=2000,
            step_size=2.5e-5,
            policy_epochs=40,
        ),
        Study(
            name="noisy-4096",
            title="Noisy margins, M = 4096",
            dataset="paper-noisy",
            target_size=4096,
            steps=2000,
            step_size=2.5e-5,
            policy_epochs=40,
            warm_up=10,
        ),
        Study(
            name="flips-512",
            title="20 % flipped labels, M = 512",
            dataset="paper",
            target_size=512,
            flipped=0.2,
            steps=1000,
            step_size=2.5e-5,
            policy_epochs=60,
        ),
        Study(
            name="flips-4096",
            title="20 % flipped labels, M = 4096",
            dataset="paper",
            target_size=4096,
            flipped=0.2,
            steps=1000,
            step_size=2.5e-5,
            policy_epochs=60,
        ),
        Study(
            name="planted-4096",
            title="Duplicates and easy examples planted, M = 4096",
            dataset="paper",
            target_size=4096,
            planted=True,
            steps=1000,
            step_size=1e-4,
            policy_epochs=80,
            warm_up=10,
        ),
    )
}
"""The studies of `equipoise reproduce perceptron`, by name."""


LN2: Final = math.log(2)
"""Loss of a uniform guess of two classes, nats."""

SCALING_STEPS: Final = (250, 500, 1000, 2000)
"""T of the runs that the scaling law is fitted to, unless told otherwise."""


def scaling_study(steps: int) -> Study:
    """Clean labels for T steps; ε falls with T, since ∂J/∂γ grows with the steps that are still to come."""
    return replace(
        STUDIES["paper-4096"],
        name=f"clean-T{steps}",
        title=f"Clean labels, M = 4096, T = {steps}",
        steps=steps,
        step_size=0.1 / steps,
        policy_epochs=80,
    )


def parse_studies(text: str) -> list[Study]:
    """Studies from a comma-separated list; `all`: all of them. Raises ValueError naming `studies`."""
    names = list(STUDIES) if text.strip() == "all" else [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in STUDIES]
    if unknown or not names:
        raise ValueError(f"studies: {text!r}, must be all, or among {', '.join(STUDIES)}")
    return [STUDIES[name] for name in names]
