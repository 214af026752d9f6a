"""An experiment: every method on every seed, hyper-parameters chosen on guard B alone; it goes on where it was stopped.

Each finished run is a file of its own in the output directory, and a run that was cut off leaves a checkpoint there.
A command started again with the same options trains what is missing.
"""

import hashlib
import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from equipoise_trainer.lm.methods import HEADLINE, MATCHED, METHODS, Method
from equipoise_trainer.lm.presets import Preset
from equipoise_trainer.lm.recipes import RecipeConfig, TextTask, load
from equipoise_trainer.lm.records import RunRecord
from equipoise_trainer.lm.runs import RunPlan, execute

OnStep: TypeAlias = Callable[[str, int], None]
"""Called after each training step with the method and the step within the run, from 1."""

FORMAT = 3
"""Version of what a run computes: runs of another version are not taken over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperimentConfig:
    """What is run.

    Attributes:
        recipe: one of `recipes.RECIPES`.
        preset: size of model and data.
        corpus: text file or data set on disk; None: Python's documentation topics.
        seeds: of data, order and model, distinct.
        methods: names, in the order of the table.
        steps: T.
        batch_size: B.
        learning_rates: every method but `norm-matched` chooses one of them, by guard B, averaged over the tuned seeds.
        tuned_seeds: the first so many seeds are run with every learning rate, the others with the chosen one.
        log_every: steps between two measurements.
        checkpoint_every: steps between two checkpoints.
    """

    recipe: str
    preset: Preset
    corpus: Path | None = None
    seeds: tuple[int, ...]
    methods: tuple[str, ...]
    steps: int
    batch_size: int
    learning_rates: tuple[float, ...]
    tuned_seeds: int = 1
    log_every: int = 25
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: {list(self.seeds)}, must be at least one, and distinct")
        for name in ("steps", "batch_size", "tuned_seeds", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}, must be at least 1")
        if not self.learning_rates or not all(0 < rate < 1 for rate in self.learning_rates):
            raise ValueError(f"learning_rates: {list(self.learning_rates)}, must be at least one, in (0, 1)")
        self.recipe_config(self.seeds[0])  # raises what is wrong with the recipe before anything runs

    def recipe_config(self, seed: int) -> RecipeConfig:
        """The task of a seed."""
        return RecipeConfig(recipe=self.recipe, preset=self.preset, seed=seed, corpus=self.corpus)

    def check_corpus(self) -> None:
        """Raises ValueError when there is no corpus, or too little of it."""
        load(self.recipe_config(self.seeds[0]))

    @property
    def needs_server(self) -> bool:
        """Whether any method has a policy."""
        return any(METHODS[name].rule for name in self.methods)

    @property
    def total_steps(self) -> int:
        """Training steps of all runs together."""
        tuned = min(self.tuned_seeds, len(self.seeds))
        each = tuned * len(self.learning_rates) + len(self.seeds) - tuned
        own = [len(self.seeds) if name == MATCHED else each for name in self.methods]
        return self.steps * sum(own)

    def plan(self, method: str, seed: int, learning_rate: float) -> RunPlan:
        """A run."""
        return RunPlan(
            method=method,
            seed=seed,
            learning_rate=learning_rate,
            steps=self.steps,
            batch_size=self.batch_size,
            log_every=self.log_every,
            checkpoint_every=self.checkpoint_every,
        )


class Workers(Protocol):
    """Who makes the runs."""

    def run(self, plans: Sequence[RunPlan]) -> list[RunRecord]:
        """The records of runs, in their order."""
        ...


class Runs:
    """The runs of an experiment, each made once: here, or by an earlier command with the same options.

    Args:
        config: the experiment.
        directory: where records and checkpoints lie.
        address: `host:port` of the policy server.
        on_step: told of every step, of those of earlier commands as well.
    """

    def __init__(
        self, config: ExperimentConfig, *, directory: Path, address: str, on_step: OnStep | None = None
    ) -> None:
        self._config = config
        self._directory = directory
        self._address = address
        self._on_step = on_step
        self._task: TextTask | None = None

    def run(self, plans: Sequence[RunPlan]) -> list[RunRecord]:
        """The records of runs, one after another."""
        return [self.get(plan) for plan in plans]

    def get(self, plan: RunPlan) -> RunRecord:
        """The record of a run."""
        path = self._directory / f"{self._key(plan)}.json"
        if path.is_file():
            self._tell(plan.method, plan.steps, known=True)
            return RunRecord.load(path)
        self._directory.mkdir(parents=True, exist_ok=True)
        named = replace(plan, policy=f"lm-{secrets.token_hex(8)}")
        record = execute(
            named,
            self._load(plan.seed),
            address=self._address,
            checkpoint=path.with_suffix(".pt"),
            on_step=lambda step: self._tell(plan.method, step),
        )
        record.save(path)
        return record

    def _load(self, seed: int) -> TextTask:
        if self._task is None or self._task.config.seed != seed:
            self._task = load(self._config.recipe_config(seed))
        return self._task

    def _key(self, plan: RunPlan) -> str:
        """Name of a run's files: of everything that it depends on."""
        facts: dict[str, Any] = {
            "format": FORMAT,
            "recipe": self._config.recipe,
            "preset": asdict(self._config.preset),
            "corpus": str(self._config.corpus),
            "method": _plain(METHODS[plan.method]),
            "plan": asdict(replace(plan, checkpoint_every=0)),
        }
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
        return f"{plan.method}-s{plan.seed}-lr{plan.learning_rate:g}-{digest}"

    def _tell(self, method: str, step: int, *, known: bool = False) -> None:
        if self._on_step is not None:
            for each in range(1, step + 1) if known else (step,):
                self._on_step(method, each)


def run_experiment(config: ExperimentConfig, workers: Workers) -> list[RunRecord]:
    """Runs what is missing; the runs at the chosen learning rates, by method and seed.

    Raises:
        equipoise.EquipoiseError: the server refused something, or cannot be reached.
    """
    independent = [name for name in config.methods if name != MATCHED]
    tuned = config.seeds[: config.tuned_seeds]
    first = workers.run([config.plan(m, s, r) for m in independent for s in tuned for r in config.learning_rates])
    rates = {name: chosen_rate([run for run in first if run.method == name]) for name in independent}
    rest = [config.plan(name, seed, rates[name]) for name in independent for seed in config.seeds if seed not in tuned]
    chosen = [run for run in first if run.learning_rate == rates[run.method]] + workers.run(rest)
    if MATCHED in config.methods:
        chosen += workers.run([matched_plan(config, run) for run in chosen if run.method == HEADLINE])
    return sorted(chosen, key=lambda run: (config.methods.index(run.method), config.seeds.index(run.seed)))


def matched_plan(config: ExperimentConfig, theirs: RunRecord) -> RunPlan:
    """Uniform, with moves as long as those of another run, at its learning rate."""
    return replace(config.plan(MATCHED, theirs.seed, theirs.learning_rate), moves=tuple(theirs.moves))


def chosen_rate(runs: Sequence[RunRecord]) -> float:
    """The learning rate whose lowest losses on B are lowest in the mean over the seeds of these runs of one method."""
    losses: dict[float, list[float]] = {}
    for run in runs:
        losses.setdefault(run.learning_rate, []).append(run.guard_loss)
    return min(losses, key=lambda rate: sum(losses[rate]) / len(losses[rate]))


def _plain(method: Method) -> dict[str, Any]:
    return {**asdict(method), "settings": dict(method.settings), "title": ""}
