import pytest

from equipoise_trainer.lm import costs
from equipoise_trainer.lm.costs import Meter


def test_units_are_plain_steps_and_everything_else_is_paid_for() -> None:
    """100 steps of 32, every fourth scored in one pass, a direction of 64 sequences and 32 of B every 10 steps."""
    meter = Meter(plain=75 * 32 + 10 * 64, one_pass=25 * 32, forward=10 * 32)
    o_stat = costs.ONE_PASS - 1
    assert meter.units(32) == pytest.approx(100 + 25 * o_stat + 10 * (64 / 32) + 10 * costs.FORWARD)
    assert Meter(plain=32).units(32) == 1
    assert Meter(ghost=32).units(32) == costs.GHOST
