"""The scaling law: what made the curves is found again, and Eq. 9 says what the curves say."""

import numpy as np
import pytest
from numpy.typing import NDArray

from equipoise_trainer.reproduction.scaling import (
    Interval,
    Law,
    acceleration,
    bootstrap,
    fit_law,
    search_pair,
    sensitivity,
)

STEPS = 2000


def curve(*, floor: float, scale: float, exponent: float, seed: int | None = None) -> NDArray[np.float64]:
    steps = np.arange(STEPS + 1, dtype=np.float64)
    losses = floor + (scale / np.maximum(steps, 1)) ** exponent
    return losses if seed is None else losses * (1 + 1e-3 * np.random.default_rng(seed).standard_normal(STEPS + 1))


def test_a_law_is_found_again() -> None:
    found = fit_law(curve(floor=0.3, scale=50.0, exponent=0.4), floor=0.3, start=20, stop=STEPS)
    assert (found.scale, found.exponent, found.r_squared) == pytest.approx((50.0, 0.4, 1.0))


def test_the_shared_floor_is_found_and_eq_9_is_what_the_curves_show() -> None:
    uniform, optimal = (
        curve(floor=0.2, scale=80.0, exponent=0.5),
        curve(floor=0.2, scale=20.0, exponent=0.55),
    )
    fit = search_pair(uniform, optimal)
    assert fit.floor == pytest.approx(0.2, abs=0.01)
    measured = STEPS / np.flatnonzero(optimal <= uniform[-1])[0]
    assert fit.acceleration == pytest.approx(measured, rel=0.01)
    assert fit.exponent_change == pytest.approx(0.1, abs=0.02)
    assert fit.scale_change == pytest.approx(0.75, abs=0.02)


def test_other_floors_fit_about_as_well_and_change_the_exponent_but_not_the_acceleration() -> None:
    uniform, optimal = curve(floor=0.5, scale=80.0, exponent=0.1), curve(floor=0.5, scale=8.0, exponent=0.11)
    fits = sensitivity(uniform, optimal, start=100)
    assert len(fits) >= 3
    assert min(fit.uniform.r_squared for fit in fits) > 0.99
    exponents = [fit.uniform.exponent for fit in fits]
    assert max(exponents) > 1.3 * min(exponents)
    accelerations = [fit.acceleration for fit in fits]
    assert max(accelerations) < 1.05 * min(accelerations)


def test_bootstrap_covers_the_truth() -> None:
    pairs = [
        (curve(floor=0.2, scale=80.0, exponent=0.5, seed=s), curve(floor=0.2, scale=20.0, exponent=0.5, seed=s + 50))
        for s in range(4)
    ]
    fits = bootstrap(pairs, samples=30)
    spread = Interval.of([fit.acceleration for fit in fits])
    assert spread.low <= 4.0 * 1.02
    assert spread.high >= 4.0 * 0.98
    assert spread.low < spread.high


def test_the_papers_own_numbers_through_eq_9() -> None:
    # Table 1's rounded coefficients; reference: T / (B2·(T/B1)^(β1/β2)) by hand.
    found = acceleration(
        Law(scale=3.16e8, exponent=0.12, r_squared=1.0), Law(scale=1.99e7, exponent=0.14, r_squared=1.0), steps=4000
    )
    assert found == pytest.approx(3.17, abs=0.01)
