"""Groups of sequences of like perplexity: ids for a policy that shall know an example before it was ever trained on.

Perplexity under a cheap model is how web corpora are cut into head, middle and tail (CCNet, Wenzek et al. 2019); here
the model is one of token pairs, counted on the training sequences themselves. Which buckets are worth training on is
left to the policy: what is easy and what is noise lie at the two ends, and neither is labelled.

Shape legend: N sequences, T tokens, V vocabulary.
"""

import numpy as np
from numpy.typing import NDArray

BACKING = 2.0
"""How many pairs the single token's frequency counts for where a pair is rare."""


def pair_losses(rows: NDArray[np.int64], *, vocabulary: int) -> NDArray[np.float64]:
    """Mean loss of each sequence under the frequencies of token pairs in all the others, nats: [N].

    Args:
        rows: int64 [N, T]; negative where a sequence has ended.
        vocabulary: V.
    """
    singles = np.bincount(rows[rows >= 0], minlength=vocabulary).astype(np.float64)
    before, after = rows[:, :-1], rows[:, 1:]
    known = (before >= 0) & (after >= 0)
    keys, counts = np.unique(before[known] * vocabulary + after[known], return_counts=True)
    contexts = np.bincount(before[known], minlength=vocabulary)
    share = (singles + 1.0) / (singles.sum() + vocabulary)
    losses = np.empty(len(rows))
    for index, (b, a, k) in enumerate(zip(before, after, known, strict=True)):
        own_keys = b[k] * vocabulary + a[k]
        # Counted without the sequence itself, or every pair would look familiar.
        pairs = counts[np.searchsorted(keys, own_keys)] - _occurrences(own_keys)
        firsts = contexts[b[k]] - _occurrences(b[k])
        losses[index] = -np.log((pairs + BACKING * share[a[k]]) / (firsts + BACKING)).mean()
    return losses


def equal_buckets(values: NDArray[np.float64], *, count: int) -> NDArray[np.int64]:
    """Bucket of each value, in [0, count), ascending with the value; sizes differ by one at most."""
    if not 1 <= count <= len(values):
        raise ValueError(f"buckets: {count}, must be in [1, {len(values)}]")
    ranks = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    return ranks * count // len(values)


def _occurrences(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    found: NDArray[np.int64] = counts[inverse]
    return found
