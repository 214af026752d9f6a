"""Buckets of sequences of like perplexity: sources for a mixture where text has none of its own.

Perplexity under a cheap model is how web corpora are cut into head, middle and tail (CCNet, Wenzek et al. 2019); here
the model is one of token pairs, counted on the sequences themselves, so that a sequence has its bucket before it was
ever trained on. What is easy and what is noise lie at the two ends, and neither is labelled: which buckets are worth
training on is left to the policy.

Shape legend: N sequences, V vocabulary.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from equipoise.errors import is_integer, require

BACKING: Final = 2.0
"""How many pairs the single token's frequency counts for where a pair is rare."""


def perplexity_buckets(sequences: Sequence[ArrayLike], *, num_buckets: int = 12) -> NDArray[np.int64]:
    """The bucket of each sequence, ascending with its perplexity: int64 [N], in [0, num_buckets).

    Buckets are equal in size but for one sequence. Sequences of fewer than two tokens count as the easiest.

    Args:
        sequences: N sequences of tokens, integers, of any length; negative ones are padding.
        num_buckets: in [1, N].

    Raises:
        InvalidRequestError: tokens are no integers, a sequence has more than one dimension, or there are fewer
            sequences than buckets.
    """
    fits = is_integer(num_buckets, 1, len(sequences) + 1)
    require(fits, field="num_buckets", value=num_buckets, rule=f"must be an integer in [1, {len(sequences)}]")
    ranks = np.argsort(np.argsort(pair_losses(sequences), kind="stable"), kind="stable")
    return ranks * num_buckets // len(sequences)


def pair_losses(sequences: Sequence[ArrayLike]) -> NDArray[np.float64]:
    """Mean loss of each sequence under the frequencies of token pairs in all the others, nats: [N].

    Arguments and errors as of `perplexity_buckets`; 0 for fewer than two tokens.
    """
    rows = [_tokens(row, place) for place, row in enumerate(sequences)]
    every = np.concatenate(rows) if rows else np.empty(0, np.int64)
    vocabulary, singles = np.unique(every[every >= 0], return_counts=True)
    owners = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    follows = (owners[:-1] == owners[1:]) & (every[:-1] >= 0) & (every[1:] >= 0)
    owner = owners[1:][follows]
    firsts = np.searchsorted(vocabulary, every[:-1][follows])
    seconds = np.searchsorted(vocabulary, every[1:][follows])
    share = (singles + 1.0) / (singles.sum() + len(vocabulary))
    # Counted without the sequence itself, or every pair would look familiar.
    pairs = _elsewhere(firsts * len(vocabulary) + seconds, owner)
    contexts = _elsewhere(firsts, owner)
    losses = -np.log((pairs + BACKING * share[seconds]) / (contexts + BACKING))
    count = np.bincount(owner, minlength=len(rows))
    return np.bincount(owner, weights=losses, minlength=len(rows)) / np.maximum(count, 1)


def _tokens(row: ArrayLike, place: int) -> NDArray[np.int64]:
    """One sequence, int64."""
    found = np.asarray(row)
    fits = found.ndim == 1 and (found.dtype.kind in "iu" or found.size == 0)
    rule = "must be integers in one dimension"
    require(fits, field=f"sequences[{place}]", value=f"{found.dtype} {list(found.shape)}", rule=rule)
    return found.astype(np.int64)


def _elsewhere(keys: NDArray[np.int64], owner: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often the key of each place occurs at places of other owners."""
    _, key, counts = np.unique(keys, return_inverse=True, return_counts=True)
    _, own, owned = np.unique(owner * (len(counts) + 1) + key, return_inverse=True, return_counts=True)
    found: NDArray[np.int64] = counts[key] - owned[own]
    return found
