from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from equipoise_trainer.lm.buckets import BACKING, equal_buckets, pair_losses
from tests.trainer.lm.sizes import tiny_task


def test_losses_are_those_of_pairs_counted_in_all_other_sequences() -> None:
    rows = np.random.default_rng(0).integers(0, 6, size=(9, 7))
    rows[4, 5:] = -1
    tokens = Counter(token for row in rows.tolist() for token in row if token >= 0)
    total = sum(tokens.values())
    found = pair_losses(rows, vocabulary=6)
    for index, row in enumerate(rows.tolist()):
        others = [row for place, row in enumerate(rows.tolist()) if place != index]
        pairs = Counter(pair for other in others for pair in pairwise(other) if min(pair) >= 0)
        firsts = Counter(pair[0] for pair in pairs.elements())
        own = [pair for pair in pairwise(row) if min(pair) >= 0]
        probabilities = [
            (pairs[pair] + BACKING * (tokens[pair[1]] + 1) / (total + 6)) / (firsts[pair[0]] + BACKING) for pair in own
        ]
        assert found[index] == pytest.approx(-np.log(probabilities).mean())


def test_buckets_are_equal_and_ascending() -> None:
    values = np.random.default_rng(0).standard_normal(103)
    buckets = equal_buckets(values, count=10)
    sizes = np.bincount(buckets)
    assert len(sizes) == 10
    assert sizes.max() - sizes.min() <= 1
    assert (np.diff(buckets[np.argsort(values)]) >= 0).all()
    with pytest.raises(ValueError, match=r"buckets: 104, must be in \[1, 103\]"):
        equal_buckets(values, count=104)


def test_easy_text_and_noise_lie_at_the_two_ends() -> None:
    task = tiny_task()
    losses = pair_losses(task.train, vocabulary=task.config.preset.vocabulary)
    clean, easy, noisy = (np.median(losses[task.sources == source]) for source in range(3))
    assert easy < clean < noisy
