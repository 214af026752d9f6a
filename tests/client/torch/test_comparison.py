"""Contributions relative to their batch, and smaller by what chance explains, beside scipy."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from equipoise.torch import CaptureError, relative, shrunk
from equipoise.torch.comparison import FARTHEST

VALUES = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40)


@given(VALUES)
def test_relative_is_a_distance_from_the_median_by_scipys_spread(values: list[float]) -> None:
    spread = scipy.stats.median_abs_deviation(values, scale="normal")
    sent = relative(values)
    assert abs(sent.mean()) < 1e-12
    if not spread > 0:
        np.testing.assert_array_equal(sent, np.zeros(len(values)))
        return
    clipped = [min(2.0, max(-2.0, (value - float(np.median(values))) / spread)) for value in values]
    np.testing.assert_allclose(sent, np.array(clipped) - np.mean(clipped), atol=1e-4)  # 1.4826 is rounded


def test_a_spread_that_is_next_to_nothing_does_not_overflow() -> None:
    np.testing.assert_allclose(relative([0.0, 1.0, 1e-311]), [-1.116, 1.558, -0.442], atol=1e-3)


def test_relative_contributions_have_no_unit_and_no_side() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, size=33)
    np.testing.assert_allclose(relative(values), relative(1e-6 * values - 5.0), rtol=1e-6)
    np.testing.assert_allclose(relative(values), -relative(-values), atol=1e-12)
    normal = relative(np.random.default_rng(1).normal(5.0, 3.0, size=100_000))
    np.testing.assert_allclose(np.quantile(normal, [0.1587, 0.5, 0.8413]), [-1.0, 0.0, 1.0], atol=0.03)


def test_one_row_does_not_outweigh_the_others() -> None:
    values = np.linspace(-1.0, 1.0, 31)
    values[3] = 1e9
    sent = relative(values)
    assert sent.max() - sent.min() <= 2 * FARTHEST
    others = np.delete(np.arange(31), 3)
    assert (np.diff(sent[others]) > 0).all()  # their order is still seen


@given(st.integers(2, 6), st.integers(0, 10**6), st.floats(0, 3))
def test_differences_of_groups_count_by_their_f_statistic(count: int, seed: int, apart: float) -> None:
    random = np.random.default_rng(seed)
    groups = np.concatenate([np.arange(count), random.integers(count, size=12)])
    values = random.normal(size=len(groups)) + apart * groups
    statistic = scipy.stats.f_oneway(*(values[groups == group] for group in range(count))).statistic
    expected = values * max(0.0, 1 - 1 / statistic)
    np.testing.assert_allclose(shrunk(values, groups * 7 + 3), expected, atol=1e-9)


def test_chance_is_sent_small_and_a_difference_nearly_whole() -> None:
    random = np.random.default_rng(4)
    groups = np.arange(32) % 12
    chance = [shrunk(random.normal(size=32), groups) for _ in range(200)]
    assert np.sqrt(np.mean(np.square(chance))) < 0.5
    apart = random.normal(size=32) + 20.0 * (groups < 4)
    assert (shrunk(apart, groups) / apart).min() > 0.9


def test_without_repeated_groups_nothing_is_known_of_chance() -> None:
    values = np.array([1.0, -2.0, 5.0])
    np.testing.assert_array_equal(shrunk(values, [5, 3, 9]), values)
    np.testing.assert_array_equal(shrunk(values, [3, 3, 3]), values)
    np.testing.assert_array_equal(shrunk([2.0, 2.0, 2.0], [0, 0, 1]), [0.0, 0.0, 0.0])  # and nothing parts these
    assert len(relative([])) == len(shrunk([], [])) == 0


def test_what_cannot_be_compared_is_named() -> None:
    with pytest.raises(CaptureError, match="contributions nan among them: must be one finite number"):
        relative([1.0, float("nan")])
    with pytest.raises(CaptureError, match=r"contributions of shape \(1, 2\)"):
        shrunk([[1.0, 2.0]], [0, 0])
    with pytest.raises(CaptureError, match=r"groups of shape \(1,\): must be one for each of 2 contributions"):
        shrunk([1.0, 2.0], [0])
