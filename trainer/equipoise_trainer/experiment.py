"""An experiment: every method on every seed, hyper-parameters chosen on guard B alone."""

import itertools
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from equipoise import PolicyAdmin, PolicySpec
from equipoise.options import WhenLost
from equipoise.policies import Durability, SettingValue
from equipoise_trainer.analysis import chosen_index, detection_auroc
from equipoise_trainer.datasets import DatasetConfig, load
from equipoise_trainer.methods import METHODS, Candidate, Method, training_set
from equipoise_trainer.perceptron import Array
from equipoise_trainer.serving import ServedFacts, ServedWeigher
from equipoise_trainer.tasks import Task
from equipoise_trainer.training import Plan, Trained, train

REACH_S = 10.0
"""Longest wait for the first sign of the server, seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperimentConfig:
    """What is run.

    Attributes:
        dataset: one of `datasets.DATASETS`.
        flipped: share of flipped training labels, in [0, 1).
        target_size: M; None: the data set's own.
        seeds: seeds, distinct.
        methods: what is compared; `norm-matched` needs `served`.
        steps: T.
        learning_rate: η, where it is not tuned.
        learning_rates: η's that every method but `uniform` and `norm-matched` chooses from; empty: `learning_rate`.
        batch_size: B; None: full batch.
        rule: rule of the served policy.
        settings: its settings; those left out get the server's defaults.
        tuned_settings: values by setting that the served policy chooses from.
        when_lost: what the served run does while the server is lost.
        durability: of the policies; None: the server's default.
    """

    dataset: str
    flipped: float
    target_size: int | None = None
    seeds: tuple[int, ...]
    methods: tuple[Method, ...] = METHODS
    steps: int
    learning_rate: float
    learning_rates: tuple[float, ...] = ()
    batch_size: int | None = None
    rule: str = "ema_sign"
    settings: Mapping[str, SettingValue] = field(default_factory=dict)
    tuned_settings: Mapping[str, tuple[SettingValue, ...]] = field(default_factory=dict)
    when_lost: WhenLost = "continue"
    durability: Durability | None = None

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: {list(self.seeds)}, must be at least one, and distinct")
        for seed in self.seeds:  # raises what is wrong with the data set before anything runs
            self.dataset_config(seed)
        for rate in (self.learning_rate, *self.learning_rates):
            Plan(learning_rate=rate, steps=self.steps, batch_size=self.batch_size)
        both = set(self.settings) & set(self.tuned_settings)
        if both:
            raise ValueError(f"tune: {min(both)!r} is set as well, must be either set or tuned")

    def dataset_config(self, seed: int) -> DatasetConfig:
        """The task of a seed."""
        return DatasetConfig(name=self.dataset, seed=seed, flipped=self.flipped, target_size=self.target_size)

    def candidates(self, method: Method) -> list[Candidate]:
        """What a method chooses from, on guard B. (`norm-matched` takes over the served run's η.)"""
        tuned = method not in ("uniform", "norm-matched") and self.learning_rates
        rates: Sequence[float] = self.learning_rates if tuned else (self.learning_rate,)
        if method != "served":
            return [Candidate(learning_rate=rate, settings={}) for rate in rates]
        names = list(self.tuned_settings)
        return [
            Candidate(learning_rate=rate, settings={**self.settings, **dict(zip(names, values, strict=True))})
            for rate in rates
            for values in itertools.product(*self.tuned_settings.values())
        ]

    @property
    def total_steps(self) -> int:
        """Training steps of all runs together."""
        return len(self.seeds) * self.steps * sum(len(self.candidates(method)) for method in self.methods)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The run of one method on one seed whose guard loss was lowest.

    Attributes:
        method: which.
        seed: which.
        candidate: its hyper-parameters.
        candidates: how many were tried.
        trained: parameters and curve.
        chosen: index into the curve at which the guard loss is lowest: where the run is read off.
        auroc: of finding flipped examples by a low score; None: no scores.
        facts: how the served run went; None: not served.
        seconds: wall-clock time of this run alone.
    """

    method: Method
    seed: int
    candidate: Candidate
    candidates: int
    trained: Trained
    chosen: int
    auroc: float | None
    facts: ServedFacts | None
    seconds: float

    @property
    def guard_loss(self) -> float:
        """Lowest guard loss, nats."""
        return float(self.trained.curve.guard_loss[self.chosen])


OnStep: TypeAlias = Callable[[Method, int], None]
"""Called after each training step with the method and the step within the run, from 1."""


def run_experiment(config: ExperimentConfig, *, address: str, on_step: OnStep | None = None) -> Iterator[Run]:
    """Runs everything, seed by seed, and yields the chosen run of each method.

    Args:
        config: what.
        address: `host:port` of the policy server; not used without the method `served`.
        on_step: told of every step.

    Raises:
        equipoise.EquipoiseError: the server refused something, or cannot be reached.
    """
    if "served" in config.methods:
        with PolicyAdmin(address, timeout=REACH_S) as admin:
            admin.server_info()  # a server that is not there is noticed before any training
    # A policy is never reused: a name of its own for each experiment.
    prefix = f"perceptron-{config.dataset}-{secrets.token_hex(4)}"
    for seed in config.seeds:
        task = load(config.dataset_config(seed))
        served: Run | None = None
        # Served goes before norm-matched, which needs its norms.
        for method in sorted(config.methods, key=lambda name: name == "norm-matched"):
            best: Run | None = None
            for index, candidate in enumerate(_candidates(config, method, served)):
                norms = served.trained.gradient_norms if method == "norm-matched" and served else None
                policy = f"{prefix}-s{seed}-c{index}"
                run = _run(config, task, method, candidate, address=address, policy=policy, norms=norms, told=on_step)
                if best is None or run.guard_loss < best.guard_loss:
                    best = run
            assert best is not None, "every method has at least one candidate"
            if method == "served":
                served = best
            yield best


def _candidates(config: ExperimentConfig, method: Method, served: Run | None) -> list[Candidate]:
    if method == "norm-matched" and served is not None:
        return [Candidate(learning_rate=served.candidate.learning_rate, settings={})]
    return config.candidates(method)


def _run(
    config: ExperimentConfig,
    task: Task,
    method: Method,
    candidate: Candidate,
    *,
    address: str,
    policy: str,
    norms: Array | None,
    told: OnStep | None,
) -> Run:
    plan = Plan(
        learning_rate=candidate.learning_rate,
        steps=config.steps,
        batch_size=config.batch_size,
        seed=task.seed,
        gradient_norms=norms,
    )
    examples = training_set(method, task)

    def on_step(step: int) -> None:
        if told is not None:
            told(method, step)

    started = time.monotonic()
    auroc: float | None = None
    facts: ServedFacts | None = None
    if method == "served":
        spec = PolicySpec(
            name=policy,
            num_examples=len(task.train),
            rule=config.rule,
            settings=candidate.settings,
            durability=config.durability,
            reference_nats=math.log(task.classes),
        )
        with ServedWeigher(address, spec=spec, when_lost=config.when_lost) as weigher:
            trained = train(task, examples, plan, weigher=weigher, on_step=on_step)
            area = detection_auroc(weigher.scores(), task.flipped)
            auroc = None if math.isnan(area) else area
            facts = weigher.facts()
    else:
        trained = train(task, examples, plan, on_step=on_step)
    return Run(
        method=method,
        seed=task.seed,
        candidate=candidate,
        candidates=len(config.candidates(method)),
        trained=trained,
        chosen=chosen_index(trained.curve.guard_loss),
        auroc=auroc,
        facts=facts,
        seconds=time.monotonic() - started,
    )
