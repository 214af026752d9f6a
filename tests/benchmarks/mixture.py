"""A mixture of five sources of real text that follows a policy, beside natural and fixed proportions.

    python -m tests.benchmarks.mixture [--seeds 5] [--first-seed 0] [--steps 300] [--searched 8] [--json FILE]

The sources are code (6,000 sequences of the standard library), documentation (`pydoc_data.topics`), licences (of
installed packages and of the system), generated lines that count, and noisy documentation, 30 % of whose tokens are
random. Wanted is a low loss on documentation: 64 of its sequences are target A, 32 guard B, 320 the test set, unseen.
The model is the small one of `equipoise train lm`, 32 sequences a step. B chooses on the first seed: the learning rate
of each method, and the best of the fixed mixtures, drawn from Dirichlet(1). All draw by `equipoise.torch.Mixture`.
"""

import argparse
import json
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from time import process_time
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from equipoise import PolicyClient, Timeout
from equipoise.torch import GhostContributions, Mixture, TargetDirection, WeightedSteps
from equipoise_trainer.lm.corpus import paragraphs
from equipoise_trainer.lm.learner import Learner, LearnerConfig
from equipoise_trainer.lm.model import sequence_losses
from equipoise_trainer.lm.presets import PRESETS
from equipoise_trainer.lm.recipes import replace_tokens
from equipoise_trainer.lm.vocabulary import Vocabulary
from tests.servers import serve

PRESET = PRESETS["small"]
BATCH = PRESET.batch_size
RATES = (0.002, 0.004, 0.008)
LONGEST = 6000
HELD = {"test": 320, "target": 64, "guard": 32}
EXPLORED, MEASURED_FROM = 44, 20
MEASURED_EVERY = 10
WANTED = "documentation"
Rows = Tensor
Steps = Iterator[None]


def code() -> Iterator[str]:
    """Files of the standard library."""
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield file.read_text(encoding="utf-8", errors="replace")


def licences() -> Iterator[str]:
    """Licence texts of installed packages and of the system."""
    installed = Path(sysconfig.get_path("purelib")).glob("*.dist-info/**/LICEN[CS]E*")
    for file in sorted([*installed, *Path("/usr/share/common-licenses").glob("*")]):
        if file.is_file():
            yield file.read_text(encoding="utf-8", errors="replace")


def counting(generator: np.random.Generator) -> Iterator[str]:
    """Generated lines."""
    for _ in range(1500):
        run, step = (int(number) for number in generator.integers(1, 1000, size=2))
        yield " ".join(f"run {run} step {step + more} done ;" for more in range(4))


def pieces(texts: Iterator[str]) -> list[str]:
    """Distinct paragraphs."""
    found = (" ".join(text.split()) for whole in texts for text in whole.split("\n\n"))
    return list(dict.fromkeys(text for text in found if text))


class Task:
    """Sequences of one seed: `sources` by name, and what is held back of the wanted one."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        texts = {"code": pieces(code()), WANTED: paragraphs(), "licences": pieces(licences())}
        texts["generated"] = list(counting(rng))
        shuffled = {name: [found[place] for place in rng.permutation(len(found))] for name, found in texts.items()}
        # Learned from training text alone: what is held back is taken from the first half of the documentation.
        learned = [text for found in shuffled.values() for text in found[len(found) // 2 :]]
        vocabulary = Vocabulary(learned, size=PRESET.vocabulary)
        packed = {name: self._packed(vocabulary, found) for name, found in shuffled.items()}
        wanted, stop, self.held = packed[WANTED], 0, {}
        for part, count in HELD.items():
            self.held[part] = torch.from_numpy(wanted[stop : stop + count])
            stop += count
        rest = wanted[stop + 1 :]
        packed[WANTED], half = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        packed["noisy"] = np.array([replace_tokens(row, vocabulary=vocabulary.size, generator=rng) for row in half])
        self.sources = {name: torch.from_numpy(rows[:LONGEST]) for name, rows in packed.items()}

    @staticmethod
    def _packed(vocabulary: Vocabulary, found: list[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
        tokens = np.concatenate(vocabulary.encode(found))
        return tokens[: len(tokens) // PRESET.length * PRESET.length].reshape(-1, PRESET.length)


@dataclass(frozen=True)
class Run:
    """One run: losses on B and on the test set every `MEASURED_EVERY` steps, and what it cost."""

    method: str
    seed: int
    rate: float
    shares: Mapping[str, float]
    guard: list[float]
    test: list[float]
    extra: float
    seconds: float

    @property
    def chosen(self) -> int:
        """Where B reads the run off."""
        return int(np.argmin(self.guard))

    def steps_to(self, loss: float) -> float:
        """Steps until the test loss is as low, infinite if it never is."""
        reached = [place for place, value in enumerate(self.test) if value <= loss]
        return (reached[0] + 1) * MEASURED_EVERY if reached else float("inf")


def trained(
    method: str, task: Task, *, seed: int, rate: float, steps: int, client: PolicyClient | None, sizes: Any = None
) -> Run:
    """One run of a method."""
    learner = Learner(LearnerConfig(preset=PRESET, seed=seed, learning_rate=rate))
    mixture = Mixture(
        {name: list(rows) for name, rows in task.sources.items()},
        client=client,
        sizes=sizes if client is None else dict.fromkeys(task.sources, 1),  # explored alike
        num_samples=steps * BATCH,
        refresh_every=BATCH,
        seed=seed,
        explore=0 if client is None else EXPLORED * BATCH,
    )
    start, extra = process_time(), 0.0
    backward = plain(learner) if client is None else measured(learner, task, client)
    guard, test, away = [], [], 0.0
    for step, (ids, rows) in enumerate(DataLoader(mixture.dataset, batch_size=BATCH, sampler=mixture)):
        extra += backward(ids, rows)
        learner.step(step)
        if (step + 1) % MEASURED_EVERY == 0:
            since = process_time()
            guard.append(learner.measure(task.held["guard"].numpy()))
            test.append(learner.measure(task.held["test"].numpy()))
            away += process_time() - since
    shares = {
        name.removeprefix("policy/share/"): value for name, value in mixture.metrics().items() if "/share/" in name
    }
    seconds = process_time() - start - away
    return Run(method, seed, rate, shares, guard, test, extra, seconds)


def plain(learner: Learner) -> Callable[[Tensor, Rows], float]:
    """The mean loss; no extra cost."""

    def backward(ids: Tensor, rows: Rows) -> float:
        sequence_losses(learner.model, rows).mean().backward()  # type: ignore[no-untyped-call]
        return 0.0

    return backward


def measured(learner: Learner, task: Task, client: PolicyClient) -> Callable[[Tensor, Rows], float]:
    """The README's lines for text; gives what a step costs beside a plain one, in plain steps."""
    direction = TargetDirection(
        learner.model,
        sequence_losses,
        list(torch.split(task.held["target"], BATCH)),
        guard_batches=[task.held["guard"]],
        refresh_every=1,
        batches_per_refresh=1,
        momentum=0.6,
        preconditioner=learner.optimizer,
    )
    steps = WeightedSteps(
        client,
        GhostContributions(learner.model, direction, shared=["positions"]),
        sampled=True,
        relative=True,
        measure_from=MEASURED_FROM,
        measure_every=2,
        measure_until=EXPLORED,
        guard_every=8,
        verify=False,
    )

    def backward(ids: Tensor, rows: Rows) -> float:
        heard = steps.schedule.hears(steps.batches)
        with steps.capture(ids) as capture:
            capture.loss(rows).backward()  # type: ignore[no-untyped-call]
        return 0.41 * capture.measured + capture.capture.refreshed + 0.35 * heard

    return backward


def main() -> None:
    """Prints a line for each run, and what they come to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("--seeds", 5), ("--first-seed", 0), ("--steps", 300), ("--searched", 8)):
        parser.add_argument(name, type=int, default=value)
    parser.add_argument("--json", type=Path)
    told = parser.parse_args()
    torch.set_num_threads(1)
    runs: list[Run] = []

    def run(method: str, seed: int, rate: float, *, sizes: Any = None) -> Run:
        task, made = tasks[seed], None
        if method != "served":
            made = trained(method, task, seed=seed, rate=rate, steps=told.steps, client=None, sizes=sizes)
        else:
            settings = {"learning_rate": 0.4, "decay": 0.0, "floor": 0.005, "unit": 1.0}
            with PolicyClient(
                server.address,
                policy=f"mixture-{seed}-{rate}",
                num_examples=len(task.sources),
                rule="exponentiated_gradient",
                settings=settings,
                timeout=Timeout(step=60.0, call=60.0),
            ) as client:
                made = trained(method, task, seed=seed, rate=rate, steps=told.steps, client=client)
        shares = ", ".join(f"{name} {value:.2f}" for name, value in made.shares.items())
        print(f"{method} seed {seed} rate {rate}: test {made.test[made.chosen]:.3f}, {shares}", flush=True)
        runs.append(made)
        return made

    def best(found: list[Run]) -> Run:
        return min(found, key=lambda each: min(each.guard))

    seeds = range(told.first_seed, told.first_seed + told.seeds)
    with serve() as server:
        first = seeds[0]
        tasks = {seed: Task(seed) for seed in seeds}
        names = list(tasks[first].sources)
        print({name: len(rows) for name, rows in tasks[first].sources.items()})
        rates = {name: best([run(name, first, rate) for rate in RATES]).rate for name in ("natural", "served")}
        drawn = np.random.default_rng(first).dirichlet(np.ones(len(names)), size=told.searched)
        searched = [dict(zip(names, shares.tolist(), strict=True)) for shares in drawn]
        searches = [run(f"fixed {n}", first, rates["natural"], sizes=sizes) for n, sizes in enumerate(searched)]
        sizes = searched[searches.index(best(searches))]
        rates["best fixed"] = best([run("best fixed", first, rate, sizes=sizes) for rate in RATES]).rate
        for seed in seeds[1:]:
            for name, rate in rates.items():
                run(name, seed, rate, sizes=sizes if name == "best fixed" else None)
    chosen = {(each.method, each.seed): each for each in runs if rates.get(each.method) == each.rate}
    for name in rates:
        own = [chosen[name, seed] for seed in seeds]
        natural = [chosen["natural", seed] for seed in seeds]
        losses = [each.test[each.chosen] for each in own]
        gaps = [loss - base.test[base.chosen] for loss, base in zip(losses, natural, strict=True)]
        fewer = [min_steps(base) / each.steps_to(min(base.test)) for each, base in zip(own, natural, strict=True)]
        print(
            f"{name:11s} rate {rates[name]} loss {mean(losses):.3f}, minus natural's "
            f"{' '.join(f'{gap:+.2f}' for gap in gaps)}; "
            f"times fewer steps {' '.join(f'{each:.2f}' for each in fewer)}; "
            f"extra cost {median(each.extra for each in own):.0f} of {told.steps} steps, "
            f"processor time {median(each.seconds for each in own):.0f} s"
        )
    if told.json:
        told.json.write_text(json.dumps([asdict(each) for each in runs], indent=1))


def min_steps(run: Run) -> float:
    """Steps to its own lowest test loss."""
    return run.steps_to(min(run.test))


if __name__ == "__main__":
    main()
