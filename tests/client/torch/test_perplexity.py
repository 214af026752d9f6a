from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from equipoise.errors import InvalidRequestError
from equipoise.torch import perplexity_buckets
from equipoise.torch.perplexity import BACKING, pair_losses
from tests.trainer.lm.sizes import tiny_task


def test_losses_are_those_of_pairs_counted_in_all_other_sequences() -> None:
    generator = np.random.default_rng(0)
    rows = [generator.integers(0, 6, size=length).tolist() for length in (7, 3, 12, 2, 5, 7, 1, 0)]
    rows[4][3:] = [-100, -100]
    tokens = Counter(token for row in rows for token in row if token >= 0)
    found = pair_losses(rows)
    for index, row in enumerate(rows):
        others = [row for place, row in enumerate(rows) if place != index]
        pairs = Counter(pair for other in others for pair in pairwise(other) if min(pair) >= 0)
        firsts = Counter(pair[0] for pair in pairs.elements())
        probabilities = [
            (pairs[pair] + BACKING * (tokens[pair[1]] + 1) / (tokens.total() + len(tokens)))
            / (firsts[pair[0]] + BACKING)
            for pair in pairwise(row)
            if min(pair) >= 0
        ]
        assert found[index] == pytest.approx(-np.log(probabilities).mean() if probabilities else 0.0)


def test_names_of_tokens_do_not_matter() -> None:
    rows = np.random.default_rng(1).integers(0, 50, size=(40, 9))
    names = np.random.default_rng(2).choice(1 << 40, size=50, replace=False)
    np.testing.assert_allclose(pair_losses(list(names[rows])), pair_losses(list(rows)))


def test_buckets_are_equal_and_ascending() -> None:
    rows = list(np.random.default_rng(0).integers(0, 9, size=(103, 8)))
    buckets = perplexity_buckets(rows, num_buckets=10)
    sizes = np.bincount(buckets)
    assert len(sizes) == 10
    assert sizes.max() - sizes.min() <= 1
    assert (np.diff(buckets[np.argsort(pair_losses(rows), kind="stable")]) >= 0).all()


@pytest.mark.parametrize(
    ("sequences", "num_buckets", "words"),
    [
        ([[1, 2]] * 3, 4, r"num_buckets.* 4.* \[1, 3\]"),
        ([[1, 2], [0.5, 1.0]], 1, r"sequences\[1\].*float64 \[2\]"),
        ([[[1, 2]]], 1, r"sequences\[0\].*int64 \[1, 2\]"),
    ],
)
def test_what_is_no_tokens_is_refused(sequences: list[list[int]], num_buckets: int, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        perplexity_buckets(sequences, num_buckets=num_buckets)


def test_easy_text_and_noise_lie_at_the_two_ends() -> None:
    task = tiny_task()
    losses = pair_losses(list(task.train))
    clean, easy, noisy = (np.median(losses[task.sources == source]) for source in range(3))
    assert easy < clean < noisy
