"""The transformer's studies: sizes, and sequences half of which carry the paper's noise."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from equipoise_trainer.offline.module import ModuleData, ModuleProblem
from equipoise_trainer.offline.planted import Planted
from equipoise_trainer.offline.rows import RowSettings
from equipoise_trainer.reproduction.jobs import Job, even_plan
from equipoise_trainer.reproduction.runs import Experiment
from equipoise_trainer.reproduction.sequences import Sizes, draw_sequences
from equipoise_trainer.reproduction.transformer import PaperTransformer, sequence_losses


@dataclass(frozen=True, slots=True, kw_only=True)
class TextStudy:
    """One size of the transformer's experiment.

    Attributes:
        name: as in `--preset`.
        width: D.
        layers: blocks.
        heads: of attention.
        length: L, tokens of a sequence.
        vocabulary: V.
        train_size: N; half of the sequences are perturbed.
        target_size: K sequences of the desired distribution.
        test_size: unseen sequences of it.
        steps: T.
        learning_rate: η.
        step_size: ε of the paper's Eq. 6, for J = Σ_t L_A(θ_t).
        policy_epochs: how often every row is moved.
        chunk: sequences that are differentiated twice at once.
    """

    name: str
    width: int
    layers: int = 2
    heads: int
    length: int
    vocabulary: int
    train_size: int
    target_size: int
    test_size: int
    steps: int
    learning_rate: float
    step_size: float
    policy_epochs: int
    chunk: int = 128

    @property
    def rows(self) -> RowSettings:
        """The policy."""
        return RowSettings(
            num_examples=self.train_size,
            rows=self.steps,
            policy_epochs=self.policy_epochs,
            learning_rate=self.learning_rate * self.step_size,
        )

    @property
    def reference_nats(self) -> float:
        """ln V."""
        return math.log(self.vocabulary)

    def to_json(self) -> dict[str, Any]:
        """Its fields by name, and ln V."""
        return {**asdict(self), "reference_nats": self.reference_nats}


TEXT_STUDIES: Final[Mapping[str, TextStudy]] = {
    study.name: study
    for study in (
        TextStudy(
            name="cpu",
            width=32,
            heads=4,
            length=16,
            vocabulary=320,
            train_size=256,
            target_size=128,
            test_size=1280,
            steps=150,
            learning_rate=0.3,
            step_size=2e-3,
            policy_epochs=15,
        ),
        TextStudy(
            name="gpu",
            width=128,
            heads=8,
            length=64,
            vocabulary=5000,
            train_size=1024,
            target_size=128,
            test_size=1024,
            steps=500,
            learning_rate=0.1,
            step_size=1e-4,
            policy_epochs=15,
            chunk=256,
        ),
        TextStudy(
            name="paper",
            width=128,
            heads=8,
            length=64,
            vocabulary=5000,
            train_size=16384,
            target_size=512,
            test_size=512,
            steps=4000,
            learning_rate=0.1,
            step_size=1e-4,
            policy_epochs=15,
            chunk=512,
        ),
    )
}
"""By name. `gpu` and `paper` have the shape of arXiv 2402.17759, appendix D; `paper` its size too."""


def text_experiment(
    study: TextStudy, seed: int, *, corpus: Path | None, device: torch.device
) -> Experiment[torch.Tensor]:
    """Model and data of a seed; what is planted as flipped is the perturbed half.

    Args:
        study: the size.
        seed: of the order of paragraphs, the noise and θ_0.
        corpus: text file or data set on disk; None: Python's own documentation topics.
        device: where it runs.

    Raises:
        ValueError: the corpus is too small.
    """
    sizes = Sizes(
        train=study.train_size,
        target=study.target_size,
        test=study.test_size,
        length=study.length,
        vocabulary=study.vocabulary,
    )
    drawn = draw_sequences(corpus, sizes, generator=np.random.default_rng(seed))
    torch.manual_seed(seed)
    module = PaperTransformer(
        vocabulary=study.vocabulary, length=study.length, width=study.width, layers=study.layers, heads=study.heads
    ).to(device)
    train, target, test = (torch.from_numpy(rows).to(device) for rows in (drawn.train, drawn.target, drawn.test))
    problem = ModuleProblem(
        module,
        sequence_losses,
        ModuleData(train=train, target=target, test=test),
        learning_rate=study.learning_rate,
        reference_nats=study.reference_nats,
        chunk=study.chunk,
    )
    study_json = {**study.to_json(), "corpus": "pydoc topics" if corpus is None else corpus.name}
    return Experiment(problem=problem, planted=Planted.of_flips(drawn.perturbed), study=study_json, seed=seed)


def text_jobs(
    study: TextStudy, seeds: Sequence[int], *, folder: Path, corpus: Path | None, device: torch.device
) -> list[Job]:
    """A size of the transformer on every seed; few steps are looked at closely, since each look takes a pull."""
    plan = replace(
        even_plan(study.policy_epochs, count=4),
        looks=11,
        tested=sorted({0, study.policy_epochs // 2, study.policy_epochs}),
    )
    plan = replace(plan, measured=sorted({*plan.measured, *plan.tested}))
    return [
        Job(
            name=study.name,
            seed=seed,
            directory=folder / study.name / f"seed-{seed}",
            rows=study.rows,
            reference_nats=study.reference_nats,
            plan=plan,
            make=lambda seed=seed: text_experiment(study, seed, corpus=corpus, device=device),  # type: ignore[misc]
        )
        for seed in seeds
    ]
