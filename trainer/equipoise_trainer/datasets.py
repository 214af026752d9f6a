"""The data sets of `equipoise train perceptron`, each a function of a seed."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from equipoise_trainer.tasks import Examples, Task, flip_labels

DIGITS_TRAIN, DIGITS_TARGET, DIGITS_GUARD = 1000, 200, 100
PAPER_FEATURES, PAPER_TRAIN, PAPER_TARGET, PAPER_GUARD, PAPER_TEST = 128, 4096, 512, 512, 20_000

DATASETS: Final = ("digits", "paper", "paper-noisy")
"""Names that `load` knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetConfig:
    """Which task to make.

    Attributes:
        name: one of `DATASETS`.
        seed: of the split or the generator, and of the flips.
        flipped: share of training labels that are replaced by wrong ones, in [0, 1).
        target_size: M; None: the data set's own (digits 200, paper 512). digits: at most 200, since the rest is fixed.
    """

    name: str
    seed: int
    flipped: float = 0.0
    target_size: int | None = None

    def __post_init__(self) -> None:
        if self.name not in DATASETS:
            raise ValueError(f"dataset: {self.name!r}, must be one of {', '.join(DATASETS)}")
        if not 0.0 <= self.flipped < 1.0:
            raise ValueError(f"flipped: {self.flipped}, must be at least 0 and below 1")
        if self.seed < 0:
            raise ValueError(f"seed: {self.seed}, must be at least 0")
        if self.target_size is not None and self.target_size < 1:
            raise ValueError(f"target_size: {self.target_size}, must be at least 1")
        if self.name == "digits" and self.target_size is not None and self.target_size > DIGITS_TARGET:
            raise ValueError(f"target_size: {self.target_size}, must be at most {DIGITS_TARGET} for digits")


def load(config: DatasetConfig) -> Task:
    """The task of a configuration; equal configurations give equal tasks."""
    if config.name == "digits":
        return _digits(config)
    return _paper(config, train_noise=1.0, target_noise=0.1) if config.name == "paper-noisy" else _paper(config)


def _digits(config: DatasetConfig) -> Task:
    """scikit-learn's 1797 handwritten digits, 8×8 pixels from 0 to 16, here scaled to [0, 1], with a bias."""
    from sklearn.datasets import load_digits  # takes half a second to import

    pixels, labels = load_digits(return_X_y=True)
    features = np.concatenate([pixels / 16.0, np.ones((len(pixels), 1))], axis=1)
    everything = Examples(features=features, labels=labels.astype(np.int64))
    generator = np.random.default_rng(config.seed)
    order = generator.permutation(len(everything)).astype(np.int64)
    edges = np.cumsum([DIGITS_TRAIN, DIGITS_TARGET, DIGITS_GUARD])
    train, target, guard, test = (everything.take(rows) for rows in np.split(order, edges))
    noisy, flipped = flip_labels(train.labels, classes=10, share=config.flipped, generator=generator)
    return Task(
        name=config.name,
        seed=config.seed,
        classes=10,
        train=Examples(features=train.features, labels=noisy),
        target=target.take(np.arange(config.target_size or DIGITS_TARGET)),
        guard=guard,
        test=test,
        flipped=flipped,
    )


def _paper(config: DatasetConfig, *, train_noise: float = 0.0, target_noise: float = 0.0) -> Task:
    """The linear teacher of arXiv 2402.17759, appendix D: z_train ~ N(0, 3I), z_desired ~ N(1/2, I), y = [T·z > 0].

    The noise is Gaussian and added to the margin T·z/|T|, the signed distance to the teacher's hyperplane. (The
    paper's code has the options `--train-noise 1 --dev-noise 0.1`, but not what they are added to. Added to T·z,
    whose standard deviation is about 66, they would hardly change a label.) All sets of the desired distribution have
    `target_noise`.
    """
    # Independent streams: another target size leaves the other sets as they are.
    teacher_rng, train_rng, target_rng, guard_rng, test_rng, flip_rng = (
        np.random.default_rng(seed) for seed in np.random.SeedSequence(config.seed).spawn(6)
    )
    teacher = teacher_rng.standard_normal(PAPER_FEATURES)
    teacher /= np.linalg.norm(teacher)  # the scale of T does not change a label

    def draw(size: int, rng: np.random.Generator, *, mean: float, variance: float, noise: float) -> Examples:
        features: NDArray[np.float64] = mean + np.sqrt(variance) * rng.standard_normal((size, PAPER_FEATURES))
        margins = features @ teacher + noise * rng.standard_normal(size)
        return Examples(features=features, labels=(margins > 0).astype(np.int64))

    def desired(size: int, rng: np.random.Generator) -> Examples:
        return draw(size, rng, mean=0.5, variance=1.0, noise=target_noise)

    train = draw(PAPER_TRAIN, train_rng, mean=0.0, variance=3.0, noise=train_noise)
    noisy, flipped = flip_labels(train.labels, classes=2, share=config.flipped, generator=flip_rng)
    return Task(
        name=config.name,
        seed=config.seed,
        classes=2,
        train=Examples(features=train.features, labels=noisy),
        target=desired(config.target_size or PAPER_TARGET, target_rng),
        guard=desired(PAPER_GUARD, guard_rng),
        test=desired(PAPER_TEST, test_rng),
        flipped=flipped,
    )
