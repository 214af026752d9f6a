"""The runs that a command wants, and where each of them lies."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from equipoise_trainer.offline.adjoint import Stop
from equipoise_trainer.offline.rows import RowSettings
from equipoise_trainer.offline.search import SearchPlan, spread_epochs
from equipoise_trainer.reproduction.runs import Experiment, OnEpoch, finished, run_experiment
from equipoise_trainer.reproduction.sites import RowsAt, open_site
from equipoise_trainer.reproduction.studies import LN2, Study


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One study on one seed.

    Attributes:
        name: of the study.
        seed: which.
        directory: its folder.
        rows: the policy.
        reference_nats: ln|V|.
        plan: how the search goes.
        make: makes the data and the model.
    """

    name: str
    seed: int
    directory: Path
    rows: RowSettings
    reference_nats: float
    plan: SearchPlan
    make: Callable[[], Experiment[Any]]

    @property
    def finished(self) -> bool:
        """Whether it was run."""
        return finished(self.directory)

    def run(self, *, at: RowsAt, address: str | None, online: bool, stop: Stop, on_epoch: OnEpoch) -> None:
        """Runs what is left of it.

        Args:
            at: who holds the rows.
            address: `host:port` of the server; None: none.
            online: whether one run with an online policy is made beside.
            stop: asked after each row.
            on_epoch: told of each policy epoch.
        """
        experiment = self.make()
        label = f"{self.name}-s{self.seed}".lower()
        with open_site(
            self.directory, self.rows, rows=at, address=address, label=label, reference_nats=self.reference_nats
        ) as site:
            site = site if online else replace(site, address=None)
            run_experiment(experiment, self.plan, site, stop=stop, on_epoch=on_epoch)


def perceptron_jobs(studies: Sequence[Study], seeds: Sequence[int], *, folder: Path, measured_epochs: int) -> list[Job]:
    """Every study on every seed."""
    return [
        Job(
            name=study.name,
            seed=seed,
            directory=folder / study.name / f"seed-{seed}",
            rows=study.rows,
            reference_nats=LN2,
            plan=replace(even_plan(study.policy_epochs, count=measured_epochs), warm_up=study.warm_up),
            make=lambda study=study, seed=seed: study.experiment(seed),  # type: ignore[misc]  # bound in the loop
        )
        for study in studies
        for seed in seeds
    ]


def even_plan(policy_epochs: int, *, count: int) -> SearchPlan:
    """Measures about `count` policy epochs, unseen examples included."""
    epochs = spread_epochs(policy_epochs, count=count)
    return SearchPlan(measured=epochs, tested=epochs)
