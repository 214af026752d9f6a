"""Sequences of tokens from a text, some of them with the paper's noise.

Shape legend: n sequences, L tokens of a sequence, V vocabulary.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from equipoise_trainer.perturbation import perturb

END = "<|end|>"
"""Between two paragraphs; id 0."""


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
        corpus: text file, paragraphs separated by blank lines; None: Python's own documentation topics.
        sizes: of the sets.
        generator: of the order of paragraphs and the noise.

    Raises:
        ValueError: there is no such text, or it is too small.
    """
    pieces = paragraphs(corpus)
    shuffled = [pieces[index] for index in generator.permutation(len(pieces))]
    # The vocabulary is learned from all the text, as the paper's is from far more than its text.
    encoded = encode(shuffled, vocabulary=sizes.vocabulary)
    # Paragraphs, not sequences, are dealt: no sequence of one set is the other half of a paragraph in another.
    target, encoded = _take(encoded, sizes.target, sizes.length)
    test, encoded = _take(encoded, sizes.test, sizes.length)
    train, _ = _take(encoded, sizes.train, sizes.length)
    perturbed = np.zeros(sizes.train, dtype=np.bool_)
    perturbed[generator.permutation(sizes.train)[: sizes.train // 2]] = True
    for row in np.flatnonzero(perturbed):
        train[row] = perturb(train[row], vocabulary=sizes.vocabulary, generator=generator)
    return Sequences(train=train, perturbed=perturbed, target=target, test=test)


def paragraphs(corpus: Path | None) -> list[str]:
    """The distinct paragraphs of a text, in order, white space collapsed. Raises ValueError naming `corpus`."""
    if corpus is None:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics))
    elif corpus.is_file():
        text = corpus.read_text(encoding="utf-8", errors="replace")
    else:
        raise ValueError(f"corpus: {corpus}, must be a text file")
    collapsed = (" ".join(piece.split()) for piece in re.split(r"\n\s*\n", text))
    return list(dict.fromkeys(piece for piece in collapsed if piece))


def encode(texts: Sequence[str], *, vocabulary: int) -> list[NDArray[np.int64]]:
    """Tokens of each paragraph, its end included, by a byte-level BPE learned from the same texts.

    Raises:
        ValueError: the texts are too short for so many tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        raise ValueError(f"corpus: holds {tokenizer.get_vocab_size()} tokens, must hold {vocabulary}")
    end = tokenizer.token_to_id(END)
    encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [np.array([*each.ids, end], dtype=np.int64) for each in encoded]


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
