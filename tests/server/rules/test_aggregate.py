from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise_server.rules import aggregate
from equipoise_server.rules.order import has_repeats

SMALLEST = float(np.finfo(np.float32).smallest_subnormal)

ROW = st.tuples(
    st.integers(0, 5),
    st.floats(-(2.0**100), 2.0**100, width=32),
    st.floats(0, 1000, width=32),
    st.booleans(),
)


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(ROW, max_size=30), mask=st.booleans())
def test_equals_a_loop_over_rows(rows: list[tuple[int, float, float, bool]], mask: bool) -> None:
    expected: dict[int, list[tuple[float, float]]] = {}
    for key, contribution, loss, scored in rows:
        if scored or not mask:
            expected.setdefault(key, []).append((contribution, loss))
    statistics = aggregate(
        np.array([row[0] for row in rows], np.int64),
        np.array([row[1] for row in rows], np.float32),
        np.array([row[2] for row in rows], np.float32),
        np.array([row[3] for row in rows], np.bool_) if mask else None,
        reference_losses=np.array([row[2] for row in rows], np.float32),
    )
    assert statistics.ids is not None
    assert statistics.contributions is not None
    assert statistics.losses is not None
    assert statistics.reference_losses is not None
    np.testing.assert_array_equal(statistics.reference_losses, statistics.losses)
    assert statistics.size == len(expected)
    rows_of = Counter(row[0] for row in rows)
    assert statistics.counts is None or statistics.counts.tolist() == [rows_of[int(key)] for key in statistics.ids]
    assert statistics.counts is not None or len(rows_of) == len(rows)
    assert sorted(statistics.ids.tolist()) == sorted(expected)
    assert statistics.contributions.dtype == statistics.losses.dtype == np.float32
    for key, contribution, loss in zip(statistics.ids, statistics.contributions, statistics.losses, strict=True):
        pairs = np.array(expected[int(key)], np.float64)
        scale = np.abs(pairs).max(axis=0)
        assert abs(contribution - pairs[:, 0].mean()) <= 1e-6 * scale[0] + SMALLEST
        assert abs(loss - pairs[:, 1].mean()) <= 1e-6 * scale[1] + SMALLEST


def test_distinct_ids_keep_the_order_of_the_request() -> None:
    ids, contributions = np.array([9, 2, 5]), np.array([1, 2, 3], np.float32)
    statistics = aggregate(ids, contributions, None, np.array([True, False, True]))
    assert statistics.ids is not None
    assert statistics.contributions is not None
    assert statistics.ids.tolist() == [9, 5]
    assert statistics.contributions.tolist() == [1, 3]
    assert statistics.losses is None


def test_row_order_is_irrelevant() -> None:
    rng = np.random.default_rng(50)
    ids, contributions = rng.integers(0, 40, 1000), rng.normal(size=1000).astype(np.float32)
    order = rng.permutation(1000)
    straight, mixed = aggregate(ids, contributions, None, None), aggregate(ids[order], contributions[order], None, None)
    assert straight.contributions is not None
    assert mixed.contributions is not None
    np.testing.assert_array_equal(straight.ids, mixed.ids)
    np.testing.assert_allclose(straight.contributions, mixed.contributions, atol=1e-6)


def test_all_examples_stay_implicit_until_some_are_not_scored() -> None:
    contributions = np.array([1, np.nan, 3], np.float32)
    assert aggregate(None, contributions, None, np.ones(3, bool)).ids is None
    some = aggregate(None, contributions, None, np.array([True, False, True]))
    assert some.ids is not None
    assert some.contributions is not None
    assert some.ids.tolist() == [0, 2]
    assert some.contributions.tolist() == [1, 3]


def test_largest_floats_average_to_a_finite_value() -> None:
    largest = np.finfo(np.float32).max
    statistics = aggregate(np.zeros(3, np.int64), np.full(3, largest, np.float32), None, None)
    assert statistics.contributions is not None
    assert statistics.contributions.tolist() == [pytest.approx(float(largest))]


@pytest.mark.parametrize("ids", [None, np.arange(3)])
def test_rows_without_statistics_score_nothing(ids: np.ndarray | None) -> None:
    statistics = aggregate(ids, None, None, None)
    assert statistics.size == 0
    assert statistics.ids is not None
    assert len(statistics.ids) == 0


def test_nothing_scored_gives_no_entries() -> None:
    statistics = aggregate(np.arange(3), np.full(3, np.nan, np.float32), None, np.zeros(3, bool))
    assert statistics.size == 0
    assert statistics.ids is not None
    assert len(statistics.ids) == 0


def plain(
    ids: list[int], columns: list[list[float]], scored: list[bool]
) -> tuple[list[int], list[list[np.float32]], list[int]]:
    """Sorted ids with a scored row, their means with rows added up in order, and how many rows each has."""
    kept = sorted({key for key, counts in zip(ids, scored, strict=True) if counts})
    means = []
    for column in columns:
        sums = dict.fromkeys(kept, 0.0)
        rows = Counter(key for key, counts in zip(ids, scored, strict=True) if counts)
        for key, value, counts in zip(ids, column, scored, strict=True):
            if counts:
                sums[key] += value
        means.append([np.float32(sums[key] / rows[key]) for key in kept])
    total = Counter(ids)
    return kept, means, [total[key] for key in kept]


@pytest.mark.parametrize("largest_id", [3, 500, 100_000, 1 << 40])
@pytest.mark.parametrize("rows", [2, 60, 2047, 2048, 9000])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_means_are_those_of_rows_added_in_the_order_of_the_request(largest_id: int, rows: int, share: float) -> None:
    rng = np.random.default_rng([largest_id, rows])
    ids = rng.integers(0, largest_id, rows, endpoint=True)
    ids[-1] = ids[0]  # one that repeats
    contributions = (rng.normal(size=rows) * 10.0 ** rng.integers(-20, 20, rows)).astype(np.float32)
    losses, references = rng.random((2, rows)).astype(np.float32)
    scored = rng.random(rows) < share
    columns = [contributions, losses, references]
    for values in columns:
        values[~scored] = np.nan
    statistics = aggregate(ids, contributions, losses, scored, reference_losses=references)
    kept, means, counts = plain(ids.tolist(), [each.tolist() for each in columns], scored.tolist())
    assert statistics.ids is not None
    assert statistics.counts is not None
    assert (statistics.ids.tolist(), statistics.counts.tolist()) == (kept, counts)
    assert statistics.ids.dtype == statistics.counts.dtype == np.int64
    given = (statistics.contributions, statistics.losses, statistics.reference_losses)
    for found, expected in zip(given, means, strict=True):
        assert found is not None
        assert found.tobytes() == np.array(expected, np.float32).tobytes()


def test_many_distinct_ids_keep_the_order_of_the_request() -> None:
    ids = np.random.default_rng(51).permutation(100_000)[:5000]
    statistics = aggregate(ids, np.arange(5000, dtype=np.float32))
    np.testing.assert_array_equal(statistics.ids, ids)
    assert statistics.counts is None


@pytest.mark.parametrize("rows", [0, 1, 2, 64, 255, 256, 5000])
def test_one_repeat_is_found_wherever_it_is(rows: int) -> None:
    ids = np.random.default_rng(rows).permutation(2 * rows)[:rows]
    assert not has_repeats(ids)
    for place in range(1, rows, max(1, rows // 7)):
        repeated = ids.copy()
        repeated[place] = ids[0]
        assert has_repeats(repeated)
