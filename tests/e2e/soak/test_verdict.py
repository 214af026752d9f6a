"""The soak's verdict sees growth and nothing else."""

import random

import pytest

from tests.e2e.soak.verdict import MEMORY, Bound, judge


def test_a_leak_is_seen_through_the_sawteeth_of_sweeps() -> None:
    random.seed(7)
    saw = [300 + (n % 10) * 2 + random.gauss(0, 1) for n in range(300)]
    assert not judge("rss", saw, MEMORY).grows
    leak = [value + n * 0.06 for n, value in enumerate(saw)]  # 18 MiB over the run, 12 between the thirds
    assert judge("rss", leak, MEMORY).grows


def test_the_bound_is_the_larger_of_share_and_slack() -> None:
    assert judge("a", [1000] * 3 + [1020] * 3, Bound(0.02, 5)).most == 1020
    assert not judge("a", [1000] * 3 + [1020] * 3, Bound(0.02, 5)).grows
    assert judge("a", [1000] * 3 + [1021] * 3, Bound(0.02, 5)).grows
    assert not judge("a", [10] * 3 + [15] * 3, Bound(0.02, 5)).grows


def test_falling_is_no_growth() -> None:
    assert not judge("a", [100, 90, 80, 70, 60, 50], Bound(0, 0)).grows


def test_too_few_samples_are_no_verdict() -> None:
    with pytest.raises(ValueError, match="at least 6"):
        judge("a", [1.0] * 5, Bound(0, 0))
