"""Contributions from sketches: exact to one rounding, whatever computes them and whatever is beside them."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from equipoise_server.rules import sketch, sketched_contributions

CPU = torch.device("cpu")


@settings(deadline=None)
@given(
    values=hnp.arrays(
        st.sampled_from([np.float16, np.float32]),
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=40),
        elements=st.floats(-1e3, 1e3, width=16),
    )
)
def test_it_is_the_inner_product(values: np.ndarray) -> None:
    sketches, target = values[:-1], values[-1]
    found = sketched_contributions(sketches, target, device=CPU)
    assert found.dtype == np.float32
    for row, contribution in zip(sketches, found, strict=True):
        pairs = zip(row.tolist(), target.tolist(), strict=True)
        exact = sum((Fraction(a) * Fraction(b) for a, b in pairs), Fraction())
        bound = sum(abs(a * b) for a, b in zip(row.tolist(), target.tolist(), strict=True))
        assert contribution == pytest.approx(float(exact), rel=2e-7, abs=1e-12 * bound + 1e-45)


@pytest.mark.parametrize("k", [1, 2, 7, 1000])
def test_threads_order_and_company_change_no_bit(
    k: int, torch_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(k)
    sketches, target = random.standard_normal((700, k)).astype(np.float32), random.standard_normal(k).astype(np.float32)
    torch_threads(1)
    together = sketched_contributions(sketches, target, device=CPU)
    torch_threads(4)
    np.testing.assert_array_equal(sketched_contributions(sketches, target, device=CPU), together)
    np.testing.assert_array_equal(sketched_contributions(sketches[::-1], target, device=CPU), together[::-1])
    monkeypatch.setattr(sketch, "CHUNK_VALUES", 3 * k)
    np.testing.assert_array_equal(sketched_contributions(sketches, target, device=CPU), together)
    alone = [sketched_contributions(row[None], target, device=CPU)[0] for row in sketches[:20]]
    np.testing.assert_array_equal(alone, together[:20])


def test_what_is_not_finite_stays_so_in_its_own_row() -> None:
    sketches = np.array([[1.0, np.nan], [3e38, 3e38], [2.0, 1.0]], np.float32)
    found = sketched_contributions(sketches, np.array([1.0, 1.0], np.float32), device=CPU)
    assert np.isnan(found[0])
    assert found[1] == np.inf
    assert found[2] == 3.0
