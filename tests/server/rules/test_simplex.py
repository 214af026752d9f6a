"""The fast projection of a row onto the simplex."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy.optimize import minimize

from equipoise_server.rules import project, project_simplex

Floats = NDArray[np.float64]


def quadratic_programme(values: Floats) -> Floats:
    """min ½|w - v|² with w >= 0 and mean 1, by sequential least squares: active sets, no thresholds."""
    result = minimize(
        lambda w: 0.5 * np.square(w - values).sum(),
        np.ones(len(values)),
        jac=lambda w: w - values,
        method="SLSQP",
        bounds=[(0.0, len(values))] * len(values),
        constraints={"type": "eq", "fun": lambda w: w.sum() - len(w), "jac": np.ones_like},
        options={"ftol": 1e-16, "maxiter": 1000},
    )
    return np.asarray(result.x)


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("seed", range(4))
def test_equals_a_quadratic_programme(spread: float, seed: int) -> None:
    values = 1 + spread * np.random.default_rng(seed).normal(size=9)
    np.testing.assert_allclose(project_simplex(values), quadratic_programme(values), atol=1e-6)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([5.0], [1.0]),
        ([1e300], [1.0]),
        ([-3.0, -3.0, -3.0], [1.0, 1.0, 1.0]),
        ([1e-30, 0.0], [1.0, 1.0]),
        ([1.0, 1.0, 0.0], [4 / 3, 4 / 3, 1 / 3]),
        ([9.0, 9.0, 0.0], [1.5, 1.5, 0.0]),
        ([1e308, 0.0], [2.0, 0.0]),
        ([1e30, 1e30, 0.0, -1e30], [2.0, 2.0, 0.0, 0.0]),
        ([4.0, 0.0, 0.0, 0.0], [4.0, 0.0, 0.0, 0.0]),
    ],
)
def test_by_hand(values: list[float], expected: list[float]) -> None:
    np.testing.assert_allclose(project_simplex(np.array(values)), expected, atol=1e-11)


@settings(max_examples=200, deadline=None)
@given(
    values=hnp.arrays(
        np.float64,
        st.integers(1, 40),
        elements=st.one_of(st.floats(-1e3, 1e3), st.integers(-2, 2).map(float), st.floats(-1e-20, 1e-20)),
    )
)
@example(values=np.array([2.0 ** -(k * k) for k in range(12)]))  # each pass of Newton's method sheds one
@example(values=-np.cumsum(1.7 ** np.arange(40)))
def test_equals_the_projection_with_floor_and_cap(values: Floats) -> None:
    weights = project_simplex(values)
    np.testing.assert_allclose(weights, project(values), atol=1e-8)
    np.testing.assert_allclose(weights, project_simplex(values + 3.0), atol=1e-8)


@settings(max_examples=200, deadline=None)
@given(values=hnp.arrays(np.float64, st.integers(1, 12), elements=st.floats(-1e300, 1e300)))
def test_any_values_are_projected_onto_the_simplex_in_their_order(values: Floats) -> None:
    weights = project_simplex(values)
    assert (weights >= 0).all()
    assert abs(weights.mean() - 1) < 1e-9
    assert (np.diff(weights[np.argsort(values, kind="stable")]) >= 0).all()


@pytest.mark.parametrize("size", [4096, 16_384, 1 << 18, 1 << 20])
@pytest.mark.parametrize("spread", [0.01, 1.0, 1e6])
def test_long_rows_keep_the_optimality_conditions(size: int, spread: float) -> None:
    """Free entries lie τ below their values, zeros are where the value is not above τ; the mean is 1."""
    values = spread * np.random.default_rng(size).standard_cauchy(size=size)
    weights = project_simplex(values)
    assert abs(weights.mean() - 1) < 1e-6
    free = weights > 0
    threshold = values[free] - weights[free]
    unit = 2.0 ** -min(40, 62 - 2 * (size - 1).bit_length())
    slack = 2 * unit + 4 * np.finfo(np.float64).eps * abs(values.max())
    assert np.ptp(threshold) <= slack
    assert values[~free].max(initial=-np.inf) <= threshold.min() + slack


def test_order_does_not_change_a_bit() -> None:
    random = np.random.default_rng(1)
    values = random.normal(size=5000)
    order = random.permutation(5000)
    np.testing.assert_array_equal(project_simplex(values)[order], project_simplex(values[order]))
