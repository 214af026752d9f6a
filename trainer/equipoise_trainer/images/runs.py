"""Runs of all methods on all seeds: rivals, and networks under a policy.

Shape legend: N training images.
"""

import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from time import perf_counter, process_time
from typing import Any, Final, TypeAlias

import torch

from equipoise import PolicySpec
from equipoise.policies import SettingValue
from equipoise.torch import TrainingOptions
from equipoise_trainer.analysis import detection_auroc
from equipoise_trainer.images.data import NOISES, ImageTask, Noise, make_task
from equipoise_trainer.images.network import Schedule, Score, score, train
from equipoise_trainer.images.rivals import RIVALS, cleanlab_is_installed
from equipoise_trainer.images.served import RULES, served

TITLES: Final[Mapping[str, str]] = {
    "uniform": "uniform",
    "served": "served policy",
    "ema-sign": "ema_sign, plain contributions",
    "cleanlab": "cleanlab",
    "small-loss": "small losses, rate known",
    "mixture": "small losses, rate unknown",
    "co-teaching": "co-teaching, rate known",
    "aum": "AUM",
    "trusted": "trusted examples added",
    "oracle": "oracle (no wrong labels)",
}
"""What the methods are called, in the order of the table."""

OnRun: TypeAlias = Callable[[str, int], None]
"""Told of each run that is over: its method, and 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperimentConfig:
    """What is run.

    Attributes:
        noise: how labels are wrong.
        share: probability of a label to be wrong, in [0, 1).
        epochs: passes over the data.
        batch: images of a step.
        learning_rates: of Adam; where there are several each method takes, seed by seed, what is best on guard B.
        seeds: of split, noise, network and order; distinct.
        methods: among `TITLES`.
        rule: of the policy of `served`.
        settings: of that rule.
        options: how contributions of `served` are measured.
    """

    noise: Noise = "confused"
    share: float = 0.3
    epochs: int = 20
    batch: int = 32
    learning_rates: tuple[float, ...] = (1e-3,)
    seeds: tuple[int, ...] = (0, 1, 2)
    methods: tuple[str, ...] = tuple(TITLES)
    rule: str = "strata"
    settings: Mapping[str, SettingValue] | None = None
    options: TrainingOptions = field(default_factory=TrainingOptions)

    def __post_init__(self) -> None:
        if self.noise not in NOISES:
            raise ValueError(f"noise: {self.noise!r}, must be one of {', '.join(NOISES)}")
        if not 0.0 <= self.share < 1.0:
            raise ValueError(f"wrong: {self.share}, must be at least 0 and below 1")
        for name in ("epochs", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}, must be at least 1")
        if not self.learning_rates or not all(0 < rate < 1 for rate in self.learning_rates):
            raise ValueError(f"learning_rates: {list(self.learning_rates)}, must be at least one, in (0, 1)")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds: {list(self.seeds)}, must be at least one, distinct and not negative")

    @property
    def num_runs(self) -> int:
        """How many runs there are."""
        return len(self.methods) * len(self.seeds) * len(self.learning_rates)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One method on one seed, after its last epoch.

    Attributes:
        method: which.
        seed: which.
        learning_rate: chosen on B.
        test: on the unseen images.
        guard_loss: on B, nats.
        auroc: of finding the wrong labels from the method's scores; NaN without wrong labels.
        seconds: wall-clock, of all that the method computes, measuring of the curve included.
        cpu_seconds: of this process; what a server computes is not in it.
        curve: on the unseen images after each epoch.
        policy: of served methods the rule, its settings and what it came to.
    """

    method: str
    seed: int
    learning_rate: float
    test: Score
    guard_loss: float
    auroc: float
    seconds: float
    cpu_seconds: float
    curve: tuple[Score, ...]
    policy: Mapping[str, Any] | None = None


def parse_methods(text: str) -> tuple[str, ...]:
    """Methods from a comma-separated list, in the order of the table; empty: all that can be run here.

    Raises:
        ValueError: a name is unknown, or its package is not installed.
    """
    wanted = [name.strip() for name in text.split(",") if name.strip()]
    for name in wanted:
        if name not in TITLES:
            raise ValueError(f"methods: {name!r}, must be among {', '.join(TITLES)}")
        if name == "cleanlab" and not cleanlab_is_installed():
            raise ValueError("methods: 'cleanlab', needs its package: pip install cleanlab")
    return tuple(
        name for name in TITLES if name in wanted or (not wanted and (name != "cleanlab" or cleanlab_is_installed()))
    )


def run_experiment(config: ExperimentConfig, *, address: str, on_run: OnRun) -> Iterator[Run]:
    """All runs, seed by seed, on one thread; of several learning rates the one that B prefers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a network is no faster on several
    try:
        for seed in config.seeds:
            task = make_task(noise=config.noise, share=config.share, seed=seed)
            _warm_up(task)
            for method in config.methods:
                tried = []
                for rate in config.learning_rates:
                    tried.append(_run(config, task, method=method, seed=seed, rate=rate, address=address))
                    on_run(method, 1)
                yield min(tried, key=lambda run: run.guard_loss)
    finally:
        torch.set_num_threads(threads)


def _warm_up(task: ImageTask) -> None:
    """What is done once in a process is no method's cost: imports, and torch's first steps."""
    for package in ("sklearn.mixture", "sklearn.model_selection", "cleanlab.filter", "cleanlab.rank"):
        with suppress(ModuleNotFoundError):
            import_module(package)
    train(task.train, Schedule(epochs=1, batch=32, learning_rate=1e-3, seed=0))


def _run(config: ExperimentConfig, task: ImageTask, *, method: str, seed: int, rate: float, address: str) -> Run:
    schedule = Schedule(epochs=config.epochs, batch=config.batch, learning_rate=rate, seed=seed)
    policy: Mapping[str, Any] | None = None
    started, cpu_started = perf_counter(), process_time()
    if method in RULES:
        name = f"images-{method}-{seed}-{secrets.token_hex(4)}"
        own = RULES[method]
        spec = PolicySpec(
            name=name,
            num_examples=len(task.train),
            rule=own or config.rule,
            settings={} if own else dict(config.settings or {}),
        )
        options = TrainingOptions() if own else config.options
        outcome, policy = served(task, schedule, address=address, spec=spec, options=options)
    else:
        outcome = RIVALS[method](task, schedule, config.share)
    seconds, cpu_seconds = perf_counter() - started, process_time() - cpu_started
    return Run(
        method=method,
        seed=seed,
        learning_rate=rate,
        test=score(outcome.trained.network, task.test),
        guard_loss=score(outcome.trained.network, task.guard).loss,
        auroc=detection_auroc(outcome.scores, task.wrong),
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        curve=tuple(outcome.trained.curve),
        policy=policy,
    )
