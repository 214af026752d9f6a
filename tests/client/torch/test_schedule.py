"""Which batches are measured, by counting them one after another."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.errors import InvalidRequestError
from equipoise.torch.schedule import Schedule

BATCHES = 60


@given(st.integers(1, 7), st.integers(0, 9), st.none() | st.integers(1, 20), st.none() | st.integers(1, 9))
def test_batches_are_measured_in_turn_and_the_guard_is_heard_afterwards(
    every: int, start: int, length: int | None, guard_every: int | None
) -> None:
    until = None if length is None else start + length
    schedule = Schedule(every=every, start=start, until=until, guard_every=guard_every if length else None)
    end = BATCHES if until is None else until
    measured = [*range(start, end, every)]
    heard = [] if until is None or guard_every is None else [*range(until, BATCHES, guard_every)]
    assert [batch for batch in range(BATCHES) if schedule.measures(batch)] == measured
    assert [batch for batch in range(BATCHES) if schedule.hears(batch)] == heard
    assert [batch for batch in range(BATCHES) if schedule.is_over(batch)] == [*range(end, BATCHES)]
    assert schedule.leaves_out == (len(measured) < BATCHES or until is not None)


def test_with_losses_alone_no_batch_is_measured_and_nothing_is_to_come() -> None:
    schedule = Schedule(every=0, compare_every=6)
    assert schedule.leaves_out
    assert all(schedule.is_over(batch) for batch in range(BATCHES))
    assert not any(schedule.measures(batch) or schedule.hears(batch) for batch in range(BATCHES))


def test_what_is_measured_is_named_as_it_was_given() -> None:
    assert str(Schedule()) == ""
    assert not Schedule().leaves_out
    schedule = Schedule(every=2, start=20, until=44, guard_every=8)
    assert str(schedule) == "measure_every = 2, measure_from = 20, measure_until = 44"
    assert str(Schedule(every=0, compare_every=6)) == "measure_every = 0, compare_every = 6"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "measure_every = 0: must be at least 1 where compare_every is 0"),
        ({"every": -1}, "measure_every = -1: must be an integer of at least 0"),
        ({"every": 1.5}, "measure_every = 1.5: must be an integer of at least 0"),
        ({"compare_every": True}, "compare_every = True: must be an integer of at least 0"),
        ({"every": 0, "compare_every": 6, "start": 3}, "measure_from = 3: needs measure_every, which is 0"),
        ({"every": 0, "compare_every": 6, "until": 3}, "measure_until = 3: needs measure_every, which is 0"),
        ({"start": -1}, "measure_from = -1: must be an integer of at least 0"),
        ({"start": 4, "until": 4}, "measure_until = 4: must be an integer above measure_from, which is 4"),
        ({"until": "4"}, "measure_until = '4': must be an integer above measure_from, which is 0"),
        ({"guard_every": 3}, "guard_every = 3: needs measure_until"),
        ({"until": 4, "guard_every": 0}, "guard_every = 0: must be an integer of at least 1"),
    ],
)
def test_what_makes_no_sense_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        Schedule(**options)
