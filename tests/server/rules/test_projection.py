import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy.optimize import minimize

from equipoise_server.rules import project
from equipoise_server.rules.projection import ONE, find_threshold

Floats = NDArray[np.float64]


def _solve(values: Floats, floor: float, cap: float) -> Floats:
    """min ½|w - v|² over the box and the mean, by sequential least squares: active sets, no thresholds."""
    size = len(values)
    result = minimize(
        lambda w: 0.5 * np.square(w - values).sum(),
        np.ones(size),
        jac=lambda w: w - values,
        method="SLSQP",
        bounds=[(floor, min(cap, size))] * size,
        constraints={"type": "eq", "fun": lambda w: w.sum() - size, "jac": np.ones_like},
        options={"ftol": 1e-16, "maxiter": 1000},
    )
    return np.asarray(result.x)


def _check_kkt(values: Floats, weights: Floats, floor: float, cap: float, tolerance: float = 1e-6) -> None:
    """w is the projection: feasible, v - w constant on the free entries, not above it at the floor, nor below at the
    cap."""
    cap = min(cap, len(values))
    assert abs(weights.mean() - 1) < tolerance
    assert weights.min() >= floor - tolerance
    assert weights.max() <= cap + tolerance
    pull = values - weights
    at_floor, at_cap = weights <= floor + tolerance, weights >= cap - tolerance
    free = ~at_floor & ~at_cap
    slack = tolerance * max(1.0, np.abs(values).max())
    if free.any():
        assert np.ptp(pull[free]) <= slack
    highest = pull[at_floor].max(initial=-math.inf)
    lowest = pull[at_cap].min(initial=math.inf)
    middle = pull[free]
    assert highest <= middle.min(initial=math.inf) + slack
    assert middle.max(initial=-math.inf) <= lowest + slack
    assert highest <= lowest + slack


@pytest.mark.parametrize(("floor", "cap"), [(0.0, math.inf), (0.0, 1.5), (0.5, 1.2), (0.3, math.inf)])
@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
def test_equals_a_quadratic_programme(floor: float, cap: float, spread: float) -> None:
    values = 1 + spread * np.random.default_rng(30).normal(size=9)
    weights = project(values, floor=floor, cap=cap)
    _check_kkt(values, weights, floor, cap)
    np.testing.assert_allclose(weights, _solve(values, floor, cap), atol=1e-6)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([5.0], [1.0]),
        ([1e300], [1.0]),
        ([-3.0, -3.0, -3.0], [1.0, 1.0, 1.0]),
        ([1e30, 1e30], [1.0, 1.0]),
        ([1e-30, 0.0], [1.0, 1.0]),
        ([1.0, 1.0, 0.0], [4 / 3, 4 / 3, 1 / 3]),
        ([9.0, 9.0, 0.0], [1.5, 1.5, 0.0]),
        ([1e308, -1e308], [2.0, 0.0]),
        ([1e30, 1e30, 0.0, -1e30], [2.0, 2.0, 0.0, 0.0]),
    ],
)
def test_simplex_by_hand(values: list[float], expected: list[float]) -> None:
    np.testing.assert_allclose(project(np.array(values)), expected, atol=1e-8)


def test_ties_far_below_a_capped_value() -> None:
    weights = project(np.array([3e30, 2e30, 2e30, 0.0]), cap=1.5)
    np.testing.assert_allclose(weights, [1.5, 1.25, 1.25, 0.0], atol=1e-8)


def test_exactly_the_cap_fills_the_mean() -> None:
    values = np.array([100.0, 90.0, 1.0, 0.5, 0.0, -7.0])
    np.testing.assert_array_equal(project(values, cap=3.0), [3, 3, 0, 0, 0, 0])


@settings(max_examples=150, deadline=None)
@given(
    values=hnp.arrays(
        np.float64,
        st.integers(1, 12),
        elements=st.one_of(st.floats(-5, 5), st.integers(-2, 2).map(float), st.floats(-1e-20, 1e-20)),
    ),
    floor=st.sampled_from([0.0, 0.1, 0.9]),
    cap=st.sampled_from([1.01, 2.0, math.inf]),
    shift=st.sampled_from([0.0, 1.0, -1e4]),
)
def test_kkt_holds_with_ties_and_any_shift(values: Floats, floor: float, cap: float, shift: float) -> None:
    weights = project(values + shift, floor=floor, cap=cap)
    _check_kkt(values + shift, weights, floor, max(cap, 2.0) if len(values) == 1 else cap)
    np.testing.assert_allclose(weights, project(values, floor=floor, cap=cap), atol=1e-8)


@settings(max_examples=80, deadline=None)
@given(
    values=hnp.arrays(np.float64, st.integers(1, 8), elements=st.floats(allow_nan=False, allow_infinity=False)),
    cap=st.sampled_from([1.5, math.inf]),
)
def test_any_float64_is_projected_onto_the_set(values: Floats, cap: float) -> None:
    weights = project(values, cap=cap)
    assert (weights >= 0).all()
    assert (weights <= cap).all()
    assert abs(weights.mean() - 1) < 1e-9
    order = np.argsort(values, kind="stable")
    assert (np.diff(weights[order]) >= 0).all()


def test_large_vector_is_projected_exactly() -> None:
    values = np.random.default_rng(31).normal(size=200_000)
    weights = project(values)
    _check_kkt(values, weights, 0.0, math.inf, tolerance=1e-8)


FIXED = st.one_of(
    st.integers(-(1 << 40), 1 << 40),
    st.builds(lambda whole, rest: whole * ONE + rest, st.integers(-2, 4), st.integers(-2, 2)),  # meets the bounds
)


@settings(max_examples=300, deadline=None)
@given(
    values=st.lists(FIXED, min_size=1, max_size=20),
    starts=st.lists(st.one_of(st.integers(-3, 3), st.integers(-(1 << 53), 1 << 53)), min_size=2, max_size=2),
    cap=st.sampled_from([ONE + ONE // 64, 2 * ONE, 1000 * ONE]),
)
@example(values=[4 * ONE + 3, 0, 0, 0], starts=[0, 1 << 53], cap=1000 * ONE)
def test_threshold_is_exact_wherever_the_search_starts(values: list[int], starts: list[int], cap: int) -> None:
    def clipped(threshold: int) -> list[int]:
        return [min(max(value - threshold, 0), cap) for value in values]

    found = [find_threshold(torch.tensor(values), floor=0, cap=cap, start=start) for start in starts]
    total = len(values) * ONE
    assert clipped(found[0]) == clipped(found[1])
    assert sum(clipped(found[0])) >= total
    assert sum(clipped(found[0])) == total or sum(clipped(found[0] + 1)) < total


@pytest.mark.parametrize(
    ("values", "bounds", "message"),
    [
        ([1.0], {"floor": 1.0}, "floor = 1.0"),
        ([1.0], {"floor": -0.1}, "floor = -0.1"),
        ([1.0, 2.0], {"cap": 1.0}, "cap = 1.0"),
        ([1.0], {"cap": math.nan}, "cap = nan"),
        ([math.nan], {}, "values"),
        ([math.inf], {}, "values"),
        ([], {}, "values"),
    ],
)
def test_what_cannot_be_projected_is_refused(values: list[float], bounds: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        project(np.array(values), **bounds)
