"""Sequences of tokens from a text, some of them with the paper's noise.

Shape legend: n sequences, L tokens of a sequence, V vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from equipoise_trainer.lm.corpus import paragraphs
from equipoise_trainer.lm.vocabulary import Vocabulary
from equipoise_trainer.perturbation import perturb


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """What a transformer learns, int64 [n, L] each.

    Attributes:
        train: the sequences that are weighed.
        perturbed: bool [n]; which of them carry noise.
        target: target A, of the desired distribution.
        test: unseen sequences of it.
    """

    train: NDArray[np.int64]
    perturbed: NDArray[np.bool_]
    target: NDArray[np.int64]
    test: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How many sequences, of how many tokens, from how many different ones."""

    train: int
    target: int
    test: int
    length: int
    vocabulary: int


def draw_sequences(corpus: Path | None, sizes: Sizes, *, generator: np.random.Generator) -> Sequences:
    """Deals a text to the three sets; half of the training sequences are perturbed.

    Args:
        corpus: text file or data set on disk, see `paragraphs`; None: Python's own documentation topics.
        sizes: of the sets.
        generator: of the order of paragraphs and the noise.

    Raises:
        ValueError: there is no such text, or it is too small.
    """
    pieces = paragraphs(corpus)
    shuffled = [pieces[index] for index in generator.permutation(len(pieces))]
    # The vocabulary is learned from all the text, as the paper's is from far more than its text.
    encoded = Vocabulary(shuffled, size=sizes.vocabulary).encode(shuffled)
    # Paragraphs, not sequences, are dealt: no sequence of one set is the other half of a paragraph in another.
    target, encoded = _take(encoded, sizes.target, sizes.length)
    test, encoded = _take(encoded, sizes.test, sizes.length)
    train, _ = _take(encoded, sizes.train, sizes.length)
    perturbed = np.zeros(sizes.train, dtype=np.bool_)
    perturbed[generator.permutation(sizes.train)[: sizes.train // 2]] = True
    for row in np.flatnonzero(perturbed):
        train[row] = perturb(train[row], vocabulary=sizes.vocabulary, generator=generator)
    return Sequences(train=train, perturbed=perturbed, target=target, test=test)


def _take(
    encoded: list[NDArray[np.int64]], size: int, length: int
) -> tuple[NDArray[np.int64], list[NDArray[np.int64]]]:
    """`size` sequences of `length` tokens from paragraphs end to end, and the paragraphs after them."""
    used, tokens = 0, 0
    while tokens < size * length:
        if used == len(encoded):
            raise ValueError(f"corpus: too small, must hold {size} more sequences of {length} tokens")
        tokens += len(encoded[used])
        used += 1
    return np.concatenate(encoded[:used])[: size * length].reshape(size, length), encoded[used:]
