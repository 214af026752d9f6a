"""One study on one seed: the search, the baselines beside it, and the files they leave.

A finished run is a folder with `run.json`; a run that was killed goes on from what its folder holds.
"""

import json
import math
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeAlias

import numpy as np

from equipoise import PolicyClient
from equipoise_trainer.analysis import effective_examples
from equipoise_trainer.offline.adjoint import Stop
from equipoise_trainer.offline.measures import Measures, losses_along
from equipoise_trainer.offline.path import RunPath
from equipoise_trainer.offline.planted import Planted
from equipoise_trainer.offline.problem import Problem, V
from equipoise_trainer.offline.rows import LocalRows, RowHolder, Weights
from equipoise_trainer.offline.search import Search, SearchPlan
from equipoise_trainer.perceptron import Array
from equipoise_trainer.provenance import machine, versions
from equipoise_trainer.training import logged_steps

OnEpoch: TypeAlias = Callable[[int, float], None]
"""Called after each policy epoch with how many are done and the seconds this one took."""

ONLINE_RULE = "ema_sign"
ONLINE_SETTINGS = {"ema_decay": 0.99, "guard": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """Losses along a run, nats.

    Attributes:
        steps: [L], ascending; the last is T.
        target_loss: [L], on A.
        test_loss: [L], on unseen examples.
        seconds: wall-clock time of the run, measures included.
        effective: effective examples at the end; NaN: uniform.
    """

    steps: Array
    target_loss: Array
    test_loss: Array
    seconds: float
    effective: float = math.nan

    def save(self, path: Path) -> None:
        """Writes a .npz file."""
        np.savez_compressed(path, allow_pickle=False, **asdict(self))

    @classmethod
    def load(cls, path: Path) -> "Curves":
        """Reads a file that `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("steps", "target_loss", "test_loss")}
            return cls(**arrays, seconds=float(file["seconds"]), effective=float(file["effective"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRun:
    """What one study on one seed gave.

    Attributes:
        study: its fields by name.
        seed: which.
        rows: who held the rows, in words.
        epoch_seconds: wall-clock time of each policy epoch without measures, as far as one process ran them.
        measures: by policy epoch, ascending; the first is the uniform policy.
        matched: uniform with the gradient norms of the final policy's run.
        online: one run with an online policy; None: not run.
        planted: what was planted.
    """

    study: dict[str, Any]
    seed: int
    rows: str
    epoch_seconds: tuple[float, ...]
    measures: tuple[Measures, ...]
    matched: Curves
    online: Curves | None
    planted: Planted

    @property
    def name(self) -> str:
        """Name of the study."""
        return str(self.study["name"])

    @property
    def uniform(self) -> Measures:
        """The run under the uniform policy."""
        return self.measures[0]

    @property
    def final(self) -> Measures:
        """The run under the final policy."""
        return self.measures[-1]

    @classmethod
    def load(cls, directory: Path) -> "FinishedRun":
        """Reads a finished run."""
        facts = json.loads((directory / "run.json").read_text(encoding="utf-8"))
        with np.load(directory / "planted.npz", allow_pickle=False) as file:
            planted = Planted(flipped=file["flipped"], easy=file["easy"], groups=file["groups"])
        online = directory / "online.npz"
        return cls(
            study=facts["study"],
            seed=facts["seed"],
            rows=facts["rows"],
            epoch_seconds=tuple(facts["epoch_seconds"]),
            measures=tuple(Measures.load(file) for file in sorted(directory.glob("epoch-*.npz"))),
            matched=Curves.load(directory / "matched.npz"),
            online=Curves.load(online) if online.exists() else None,
            planted=planted,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where a run happens.

    Attributes:
        directory: the run's folder.
        holder: who holds the rows.
        rows: that in words.
        address: server for the online policy; None: none.
    """

    directory: Path
    holder: RowHolder
    rows: str
    address: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment(Generic[V]):
    """What is searched.

    Attributes:
        problem: model and data.
        planted: what is known of the examples.
        study: where they come from, for the record.
        seed: which.
    """

    problem: Problem[V]
    planted: Planted
    study: dict[str, Any]
    seed: int


def finished(directory: Path) -> bool:
    """Whether a folder holds a finished run."""
    return (directory / "run.json").exists()


def run_experiment(
    experiment: Experiment[V], plan: SearchPlan, site: Site, *, stop: Stop = lambda: False, on_epoch: OnEpoch
) -> None:
    """Runs what is left of an experiment.

    Raises:
        StoppedError: `stop` said so; the same call goes on.
        RowsLostError: an epoch was interrupted whose rows are not known any more.
    """
    problem, planted = experiment.problem, experiment.planted
    seconds: list[float] = []

    def told(epoch: int, took: float) -> None:
        seconds.append(took)
        on_epoch(epoch, took)

    search = Search(
        problem=problem,
        holder=site.holder,
        plan=plan,
        planted=planted,
        directory=site.directory,
        keeps_rows=not isinstance(site.holder, LocalRows),
        stop=stop,
        on_epoch=told,
    )
    measures, _ = search.run()
    matched_uniform(problem, measures[-1]).save(site.directory / "matched.npz")
    if site.address is not None:
        policy = f"online-{secrets.token_hex(8)}"
        online_run(problem, steps=site.holder.settings.rows, address=site.address, policy=policy).save(
            site.directory / "online.npz"
        )
    np.savez_compressed(
        site.directory / "planted.npz",
        allow_pickle=False,
        flipped=planted.flipped,
        easy=planted.easy,
        groups=planted.groups,
    )
    finish(site, study=experiment.study, seed=experiment.seed, seconds=seconds)


def finish(site: Site, *, study: dict[str, Any], seed: int, seconds: list[float]) -> None:
    """Writes `run.json`, which makes the run finished, and removes what only an unfinished one needs."""
    document = {
        "study": study,
        "seed": seed,
        "rows": site.rows,
        "epoch_seconds": [round(each, 4) for each in seconds],
        "machine": machine(),
        "versions": versions(),
    }
    scratch = site.directory / "run.json.new"
    scratch.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, site.directory / "run.json")
    for name in ("rows.npy", "rows.json"):
        (site.directory / name).unlink(missing_ok=True)


def matched_uniform(problem: Problem[V], final: Measures) -> Curves:
    """Uniform weights, each gradient rescaled to the norm that the final policy's had at that step.

    At equal η a policy can win by longer steps alone; this run takes steps as long.
    """
    started = time.monotonic()
    steps = len(final.gradient_norms)
    ones = np.broadcast_to(np.float32(1), (steps, problem.num_examples))
    path = RunPath.run(problem, ones, norms=final.gradient_norms)
    return Curves(
        steps=np.arange(steps + 1, dtype=np.float64),
        target_loss=losses_along(path, "target"),
        test_loss=losses_along(path, "test"),
        seconds=time.monotonic() - started,
    )


def online_run(problem: Problem[V], *, steps: int, address: str, policy: str) -> Curves:
    """One run with an online policy of the same server: what can be had without knowing the future.

    The weights of a step answer its own contributions, which are known before its parameters move.
    """
    started = time.monotonic()
    logged = logged_steps(steps)
    seen: dict[int, tuple[float, float]] = {}
    weights: Weights = np.ones(problem.num_examples, dtype=np.float32)
    parameters = problem.initial()
    with PolicyClient(
        address,
        policy=policy,
        num_examples=problem.num_examples,
        rule=ONLINE_RULE,
        settings=ONLINE_SETTINGS,
        durability="behind",
        reference_nats=problem.reference_nats,
        when_lost="wait",
    ) as client:
        for step in range(steps):
            if step in logged:
                seen[step] = _losses_at(problem, parameters)
            look = problem.replay([parameters], weights[None]).look(0)
            answer = client.step(contributions=look.contributions, losses=look.losses, all_examples=True, step=step)
            weights = answer.weights
            parameters, _ = problem.descend(parameters, weights)
        client.delete()
    seen[steps] = _losses_at(problem, parameters)
    return Curves(
        steps=np.array(list(seen), dtype=np.float64),
        target_loss=np.array([target for target, _ in seen.values()]),
        test_loss=np.array([test for _, test in seen.values()]),
        seconds=time.monotonic() - started,
        effective=effective_examples(weights.astype(np.float64)),
    )


def _losses_at(problem: Problem[V], parameters: V) -> tuple[float, float]:
    return (
        float(problem.mean_losses([parameters], "target")[0]),
        float(problem.mean_losses([parameters], "test")[0]),
    )
