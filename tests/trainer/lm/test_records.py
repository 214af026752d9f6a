from dataclasses import replace
from pathlib import Path

import pytest

from equipoise_trainer.lm.records import Curve, RunRecord
from equipoise_trainer.lm.summary import speed_up, summarise

CURVE = Curve(
    step=[0, 10, 20],
    units=[0.0, 12.0, 24.0],
    guard_loss=[5.0, 3.0, 3.5],
    test_loss=[5.0, 4.0, 3.0],
    shares=[None, [0.5, 0.25, 0.25], [0.7, 0.2, 0.1]],
)
RECORD = RunRecord(
    method="buckets", seed=0, learning_rate=0.1, curve=CURVE, moves=[0.1, 0.2], counts={"plain": 3}, seconds=1.5
)


def test_a_run_is_read_off_where_the_guard_loss_is_lowest_not_the_test_loss() -> None:
    assert (RECORD.chosen, RECORD.guard_loss, RECORD.test_loss) == (1, 3.0, 4.0)


@pytest.mark.parametrize(
    ("level", "units"), [(6.0, 0.0), (5.0, 0.0), (4.5, 6.0), (4.0, 12.0), (3.25, 21.0), (2.9, None)]
)
def test_units_to_a_loss_are_interpolated(level: float, units: float | None) -> None:
    assert RECORD.units_to(level) == units


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    RECORD.save(tmp_path / "run.json")
    assert RunRecord.load(tmp_path / "run.json") == RECORD
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_speed_ups_are_ratios_of_units_and_differences_are_paired() -> None:
    slow = replace(RECORD, method="uniform", curve=replace(CURVE, units=[0.0, 10.0, 20.0], test_loss=[5.0, 4.8, 4.5]))
    assert speed_up(RECORD, slow) == pytest.approx(20 / 6)
    assert speed_up(slow, RECORD) is None
    rows = {row.method: row for row in summarise([RECORD, slow, replace(RECORD, seed=1), replace(slow, seed=1)])}
    assert rows["buckets"].below_uniform == pytest.approx((0.8, 0.8))
    assert rows["buckets"].final_below_uniform == pytest.approx((1.5, 1.5))
    assert rows["buckets"].speed_ups == pytest.approx((20 / 6, 20 / 6))
    assert rows["buckets"].shares == pytest.approx((0.6, 0.225, 0.175))
