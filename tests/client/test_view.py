"""The cache against a dictionary."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from equipoise.view import WeightsCache

ANSWERS = st.lists(
    st.tuples(st.lists(st.integers(0, 30), min_size=1, max_size=8, unique=True), st.integers(0, 9)), max_size=20
)


def fill(cache: WeightsCache, answers: list[tuple[list[int], int]]) -> dict[int, float]:
    newest: dict[int, tuple[int, float]] = {}
    for number, (ids, version) in enumerate(answers):
        weights = np.arange(len(ids), dtype=np.float32) + 100 * number
        cache.store(np.array(ids, np.uint64), weights, version=version)
        for example, weight in zip(ids, weights.tolist(), strict=True):
            if version >= newest.get(example, (0, 0.0))[0]:
                newest[example] = (version, weight)
    return {example: weight for example, (_, weight) in newest.items()}


@given(ANSWERS)
def test_with_room_for_all_it_holds_the_newest_of_each(answers: list[tuple[list[int], int]]) -> None:
    cache = WeightsCache(capacity=1000)
    cache.resize(31)
    expected = fill(cache, answers)
    weights, known = cache.lookup(np.arange(31, dtype=np.uint64))
    assert {int(i): float(weights[i]) for i in np.flatnonzero(known)} == expected
    assert (weights[~known] == 1).all()


@given(ANSWERS)
def test_without_room_it_knows_fewer_but_nothing_wrong(answers: list[tuple[list[int], int]]) -> None:
    cache = WeightsCache(capacity=7)
    cache.resize(31)
    ordered = [(ids, number) for number, (ids, _) in enumerate(answers)]  # versions grow, as in a stream
    expected = fill(cache, ordered)
    weights, known = cache.lookup(np.arange(31, dtype=np.uint64))
    assert known.sum() <= 7
    assert all(expected[int(i)] == float(weights[i]) for i in np.flatnonzero(known))
    if answers:
        assert known[answers[-1][0]].any()


def test_memory_is_bounded_by_the_capacity_not_by_the_policy() -> None:
    cache = WeightsCache(capacity=8)
    cache.resize(10**12)
    cache.store(np.array([10**12 - 1], np.uint64), np.array([3.0], np.float32), version=1)
    assert cache.lookup(np.array([10**12 - 1], np.uint64))[0].tolist() == [3.0]
