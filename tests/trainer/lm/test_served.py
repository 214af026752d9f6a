"""What a served run sends, and when."""

import numpy as np
import scipy.stats

from equipoise_trainer.lm.served import FARTHEST, Schedule, relative, shrunk


def test_relative_contributions_have_mean_zero_and_no_unit() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, size=33)
    np.testing.assert_allclose(relative(values).mean(), 0.0, atol=1e-12)
    np.testing.assert_allclose(relative(values), relative(1e-6 * values - 5.0), rtol=1e-6)
    np.testing.assert_allclose(relative(values), -relative(-values), atol=1e-12)
    normal = relative(np.random.default_rng(1).normal(5.0, 3.0, size=100_000))
    np.testing.assert_allclose(np.quantile(normal, [0.1587, 0.5, 0.8413]), [-1.0, 0.0, 1.0], atol=0.03)


def test_one_sequence_does_not_outweigh_the_others() -> None:
    values = np.linspace(-1.0, 1.0, 31)
    values[3] = 1e9
    sent = relative(values)
    assert sent.max() - sent.min() <= 2 * FARTHEST
    others = np.delete(np.arange(31), 3)
    assert (np.diff(sent[others]) > 0).all()  # their order is still seen


def test_without_spread_nothing_is_told() -> None:
    np.testing.assert_array_equal(relative(np.full(8, 0.3)), np.zeros(8))


def test_a_schedule_learns_for_a_while_and_hears_the_guard_afterwards() -> None:
    schedule = Schedule(start=4, until=10, every=3, guard_every=5)
    assert [step for step in range(30) if schedule.scores(step)] == [4, 7]
    assert [step for step in range(30) if schedule.hears(step)] == [10, 15, 20, 25]
    endless = Schedule(start=4, every=10)
    assert [step for step in range(30) if endless.scores(step)] == [4, 14, 24]
    assert not any(endless.hears(step) for step in range(30))


def test_differences_of_groups_count_by_their_f_statistic() -> None:
    values = np.random.default_rng(3).normal(size=12) + np.repeat([-1.0, 0.0, 2.0], 4)
    groups = np.repeat([7, 1, 4], 4)
    f_statistic = scipy.stats.f_oneway(values[:4], values[4:8], values[8:]).statistic
    assert f_statistic > 1
    np.testing.assert_allclose(shrunk(values, groups), values * (1 - 1 / f_statistic))


def test_chance_is_sent_small_and_a_difference_nearly_whole() -> None:
    random = np.random.default_rng(4)
    groups = np.arange(32) % 12
    chance = [shrunk(random.normal(size=32), groups) for _ in range(200)]
    assert np.sqrt(np.mean(np.square(chance))) < 0.5
    apart = random.normal(size=32) + 20.0 * (groups < 4)
    assert (shrunk(apart, groups) / apart).min() > 0.9


def test_without_repeated_groups_nothing_is_known_of_chance() -> None:
    values = np.array([1.0, -2.0, 5.0])
    np.testing.assert_array_equal(shrunk(values, np.array([5, 3, 9])), values)
    np.testing.assert_array_equal(shrunk(values, np.array([3, 3, 3])), values)
