"""What a run learns from: training sequences of known quality, and three sets of the desired distribution.

Shape legend: N training sequences, T tokens of a sequence, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from equipoise_trainer.lm.corpus import paragraphs
from equipoise_trainer.lm.presets import Preset
from equipoise_trainer.lm.vocabulary import Vocabulary
from equipoise_trainer.perturbation import perturb

RECIPES: Final = ("clean", "perturbed", "three-sources")
"""Names that `load` knows."""

TARGET_SIZE, GUARD_SIZE, TEST_SIZE = 64, 32, 640
"""Sequences of target A, guard B and of the test set, all of the desired distribution."""

VOCABULARY_SHARE = 0.3
"""Share of the paragraphs from which the vocabulary is learned: the last ones, never in test, A or B."""

REPLACED = 0.3
"""Share of tokens of the source `noisy` that are replaced by random ones."""

CLEAN, EASY, NOISY = "target", "easy", "noisy"
SOURCES: Final = (CLEAN, EASY, NOISY)
"""Of training sequences: the desired distribution, generated text that is easy and off the target, and noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeConfig:
    """Which task to make.

    Attributes:
        recipe: one of `RECIPES`.
        preset: length and vocabulary of the sequences.
        seed: of the split, the order, the noise and the generated text.
        corpus: text file or data set on disk; None: `pydoc_data.topics`.
    """

    recipe: str
    preset: Preset
    seed: int
    corpus: Path | None = None

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise ValueError(f"recipe: {self.recipe!r}, must be one of {', '.join(RECIPES)}")
        if self.seed < 0:
            raise ValueError(f"seed: {self.seed}, must be at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTask:
    """Sequences of tokens, int64, `PADDING` where a sequence has ended.

    Attributes:
        config: what it was made from.
        train: [N, T]; the index of a sequence is its id.
        sources: [N], index into `SOURCES`.
        target: A, gives the direction of the contributions.
        guard: B, chooses settings and the step at which a run is read off.
        test: measured, never used.
    """

    config: RecipeConfig
    train: NDArray[np.int64]
    sources: NDArray[np.int64]
    target: NDArray[np.int64]
    guard: NDArray[np.int64]
    test: NDArray[np.int64]

    @property
    def noisy(self) -> NDArray[np.bool_]:
        """Which training sequences hold planted noise, [N]."""
        found: NDArray[np.bool_] = self.sources == SOURCES.index(NOISY)
        return found


def load(config: RecipeConfig) -> TextTask:
    """The task of a configuration; equal configurations give equal tasks.

    Paragraphs, not sequences, are dealt to test, A, B and training, so that no sequence of one is the other half of a
    paragraph in another. The vocabulary is learned from training paragraphs alone.

    Raises:
        ValueError: the corpus is missing, or too small for the sets.
    """
    # Independent streams: another recipe leaves the split as it is.
    split_rng, noise_rng, easy_rng = (np.random.default_rng(s) for s in np.random.SeedSequence(config.seed).spawn(3))
    pieces = paragraphs(config.corpus)
    shuffled = [pieces[index] for index in split_rng.permutation(len(pieces))]
    held, rest, vocabulary = _deal(shuffled, config.preset)
    good = _pack(vocabulary.encode(rest), config.preset.length)
    half = len(good) // 2
    if config.recipe == "clean":
        parts = {CLEAN: good}
    elif config.recipe == "perturbed":
        noisy = [perturb(row, vocabulary=vocabulary.size, generator=noise_rng) for row in good[half:]]
        parts = {CLEAN: good[:half], NOISY: np.array(noisy)}
    else:
        noisy = [replace_tokens(row, vocabulary=vocabulary.size, generator=noise_rng) for row in good[half:]]
        easy = _pack(
            vocabulary.encode(list(_counting(len(good) * config.preset.length, easy_rng))), config.preset.length
        )
        parts = {CLEAN: good[:half], EASY: easy[:half], NOISY: np.array(noisy)}
    return TextTask(
        config=config,
        train=np.concatenate(list(parts.values())),
        sources=np.concatenate([np.full(len(rows), SOURCES.index(name)) for name, rows in parts.items()]),
        target=held[1],
        guard=held[2],
        test=held[0],
    )


def replace_tokens(tokens: NDArray[np.int64], *, vocabulary: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Replaces each token by a random one with probability `REPLACED`."""
    replaced = generator.random(len(tokens)) < REPLACED
    return np.where(replaced, generator.integers(vocabulary, size=len(tokens)), tokens)


def _deal(shuffled: Sequence[str], preset: Preset) -> tuple[list[NDArray[np.int64]], Sequence[str], Vocabulary]:
    """Test, A and B as sequences; the paragraphs left for training, and the vocabulary learned from them."""
    sizes = (TEST_SIZE, TARGET_SIZE, GUARD_SIZE)
    # How many paragraphs the sets take depends on the vocabulary, which must not have seen them: it is learned from
    # the last ones, which are always left for training.
    most = round(len(shuffled) * (1 - VOCABULARY_SHARE))
    vocabulary = Vocabulary(shuffled[most:], size=preset.vocabulary)
    encoded = vocabulary.encode(shuffled)
    held, start = [], 0
    for size in sizes:
        stop, tokens = start, 0
        while tokens < size * preset.length:
            if stop == most:
                raise ValueError(
                    f"corpus: {1 - VOCABULARY_SHARE:.0%} of it is less than the {sum(sizes)} sequences of "
                    f"{preset.length} tokens that test, A and B need"
                )
            tokens += len(encoded[stop])
            stop += 1
        held.append(_pack(encoded[start:stop], preset.length)[:size])
        start = stop
    return held, shuffled[start:], vocabulary


def _pack(encoded: Sequence[NDArray[np.int64]], length: int) -> NDArray[np.int64]:
    """Sequences of `length` tokens from paragraphs end to end; what is left over is dropped."""
    tokens = np.concatenate(encoded)
    return tokens[: len(tokens) // length * length].reshape(-1, length)


def _counting(tokens: int, generator: np.random.Generator) -> Iterator[str]:
    """Generated lines that count upwards: at least one byte, and so one token, for each of `tokens`."""
    written = 0
    while written < tokens * 4:
        run, step = (int(number) for number in generator.integers(1, 1000, size=2))
        line = " ".join(f"run {run} step {step + more} done ;" for more in range(8))
        written += len(line)
        yield line
