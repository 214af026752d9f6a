"""The projection, and rows held in this process."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import minimize

from equipoise_trainer.offline.copies import RowCopy, RowsLostError
from equipoise_trainer.offline.rows import LocalRows, RowSettings
from equipoise_trainer.offline.simplex import project

SETTINGS = RowSettings(num_examples=5, rows=3, policy_epochs=4, learning_rate=0.02)


@given(arrays(np.float64, st.integers(1, 40), elements=st.floats(-50, 50)))
def test_the_projection_is_on_the_simplex_and_no_point_of_it_is_nearer(point: np.ndarray) -> None:
    nearest = project(point)
    assert nearest.min() >= 0
    assert nearest.sum() == pytest.approx(1, abs=1e-11)  # 40 values of up to 50, each with a rounding error of its own
    # Optimality of a projection onto a convex set: (point − nearest)·(other − nearest) ≤ 0 for all its corners.
    slope = point - nearest
    assert (slope.max() - slope @ nearest) <= 1e-9 * max(1.0, np.abs(point).max())


def test_the_projection_is_what_a_quadratic_program_finds() -> None:
    point = np.random.default_rng(0).normal(0.1, 0.3, 8)
    found = minimize(
        lambda gamma: ((gamma - point) ** 2).sum(),
        np.full(8, 1 / 8),
        jac=lambda gamma: 2 * (gamma - point),
        bounds=[(0, 1)] * 8,
        constraints={"type": "eq", "fun": lambda gamma: gamma.sum() - 1},
        options={"ftol": 1e-15},
    )
    np.testing.assert_allclose(project(point), found.x, atol=1e-6)


def test_rows_move_alone_by_a_step_that_falls_to_zero() -> None:
    holder = LocalRows(SETTINGS)
    contributions = np.array([1, -1, 0.5, 0, 0], dtype=np.float32)
    gamma = np.full(5, 0.2)
    for moves in range(SETTINGS.policy_epochs + 1):
        holder.move(1, contributions)
        gamma = project(gamma + 0.02 * max(0.0, 1 - moves / 4) * contributions)
        np.testing.assert_allclose(holder.fetch(1, 1)[0] / 5, gamma, rtol=1e-6)
    np.testing.assert_array_equal(holder.fetch(0, 3)[[0, 2]], np.ones((2, 5)))
    assert holder.moves() == 5


def test_a_copy_survives_the_process_and_only_fits_its_policy_and_epoch(tmp_path: Path) -> None:
    holder = LocalRows(SETTINGS)
    first, done = RowCopy(tmp_path).take(holder)
    assert done == 0
    before = np.array(first)
    holder.move(2, np.arange(5, dtype=np.float32))
    again, done = RowCopy(tmp_path).take(holder)
    assert done == 1
    np.testing.assert_array_equal(again, before)
    with pytest.raises(RowsLostError, match="has had 1 of 3 moves"):
        RowCopy(tmp_path / "elsewhere").take(holder)
    stranger = LocalRows(SETTINGS)
    stranger.move(0, np.arange(5, dtype=np.float32))
    with pytest.raises(RowsLostError):
        RowCopy(tmp_path).take(stranger)
    for row in (1, 0):
        holder.move(row, np.arange(5, dtype=np.float32))
    fresh, done = RowCopy(tmp_path).take(holder)
    assert done == 0
    np.testing.assert_array_equal(fresh, holder.fetch(0, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_examples": 1}, "num_examples: 1, must be at least 2"),
        ({"rows": 0}, "rows: 0, must be at least 1"),
        ({"policy_epochs": 0}, "policy_epochs: 0, must be at least 1"),
        ({"learning_rate": float("nan")}, "learning_rate: nan, must be a positive number"),
    ],
)
def test_settings_name_what_is_wrong(change: dict[str, float], message: str) -> None:
    values = {"num_examples": 5, "rows": 3, "policy_epochs": 4, "learning_rate": 0.02} | change
    with pytest.raises(ValueError, match=message):
        RowSettings(**values)
