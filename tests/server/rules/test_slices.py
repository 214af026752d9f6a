"""O(N) work in slices: each is bounded, and together they do what `init` and `restore` do."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from equipoise_server.rules import (
    PAGE_EXAMPLES,
    Rule,
    RuleError,
    Slices,
    Statistics,
    TableState,
    build,
    exhaust,
    slices,
)
from tests.server.rules.conftest import told

Start = Callable[[Rule, int], TableState]
MakeStep = Callable[..., Statistics]

CPU = torch.device("cpu")
TRAJECTORY = {"rows": 50, "learning_rate": 0.1}


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The tensors that `torch.empty` gives, full of 7 instead of what happens to be there."""
    tensors: list[torch.Tensor] = []

    def dirty(*size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        tensors.append(torch.full(size, 7, dtype=dtype, device=device))
        return tensors[-1]

    monkeypatch.setattr(torch, "empty", dirty)
    return tensors


def counted(work: Slices[TableState]) -> tuple[int, TableState]:
    """How many slices come before the result, and the result."""
    count = 0
    while True:
        try:
            next(work)
        except StopIteration as ended:
            return count, ended.value
        count += 1


def test_exhaust_returns_the_result_after_all_slices() -> None:
    done = []

    def work() -> Slices[str]:
        for number in range(3):
            done.append(number)
            yield
        return "result"

    assert exhaust(work()) == "result"
    assert done == [0, 1, 2]


@pytest.mark.usefixtures("allocated")
def test_tables_are_filled_in_bounded_slices(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "SLICE_VALUES", 100)
    work = rule.init_slices(1050, device=CPU)
    count, state = counted(work)
    assert count == 11 * len(rule.columns)
    for name, column in state.columns.items():
        assert (column == (-1 if name in ("raw", "stratum") else 0)).all()
        assert column.dtype == rule.columns[name]
        assert column.shape == (1050,)
    assert (state.scored, state.raw_sum, state.raw_square_sum, state.scalars) == (0, 0, 0, {})


@pytest.mark.usefixtures("allocated")
def test_a_trajectory_is_filled_in_bounded_slices_of_whole_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "SLICE_VALUES", 100)
    count, state = counted(build("trajectory", TRAJECTORY).init_slices(30, device=CPU))
    assert count == 17 + 1 + 1  # three rows of weights a slice
    assert (state.columns["weight"] == 1.0).all()
    assert (state.columns["updates"] == 0).all()
    assert (state.columns["effective"] == 30.0).all()


def test_the_first_slice_leaves_most_of_the_tables_untouched(
    allocated: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "SLICE_VALUES", 100)
    next(build("ema_sign", {}).init_slices(1000, device=CPU))
    assert sum(int((column != 7).sum()) for column in allocated) == 100
    assert sum(len(column) for column in allocated) == 2000


def test_on_device_meta_there_is_nothing_to_fill(rule: Rule) -> None:
    count, state = counted(rule.init_slices(10**12, device=torch.device("meta")))
    assert count == 0
    assert {name: (column.dtype, len(column)) for name, column in state.columns.items()} == {
        name: (dtype, 10**12) for name, dtype in rule.columns.items()
    }


def test_restoring_yields_between_spans_and_gives_exact_sums(
    table_rule: Rule, start: Start, make_step: MakeStep
) -> None:
    num_examples = 2 * PAGE_EXAMPLES + 5
    state = table_rule.update(
        start(table_rule, num_examples), make_step(table_rule, np.random.default_rng(60), num_examples, 90_000)
    )
    raw = [value for value in state.columns["raw"].tolist() if value >= 0]
    expected = (len(raw), sum(raw), sum(value * value for value in raw))
    state.scored = state.raw_sum = state.raw_square_sum = 0
    count, restored = counted(table_rule.restore_slices(state))
    assert count == 3
    assert (restored.scored, restored.raw_sum, restored.raw_square_sum) == expected


def test_a_bad_row_is_found_when_its_span_comes(table_rule: Rule, start: Start) -> None:
    state = start(table_rule, 2 * PAGE_EXAMPLES + 5)
    state.columns["raw"][PAGE_EXAMPLES + 3] = -2
    work = table_rule.restore_slices(state)
    next(work)
    with pytest.raises(
        RuleError, match=rf"state.raw\[{PAGE_EXAMPLES + 3}\] = -2: rule {table_rule.name} never writes that"
    ):
        next(work)


def test_a_trajectory_is_restored_row_by_row() -> None:
    rule = build("trajectory", TRAJECTORY)
    state = rule.update(
        rule.init(30, device=CPU),
        Statistics(ids=None, contributions=np.arange(30, dtype=np.float32), trajectory_row=4),
    )
    effective = state.columns["effective"].clone()
    state.columns["effective"][:] = 0.0
    count, restored = counted(rule.restore_slices(state))
    assert count == 50
    assert restored.columns["effective"].equal(effective)


def test_a_batch_rule_has_no_slices(start: Start) -> None:
    rule = build("boltzmann", {})
    state = rule.update(start(rule, 10), told(rule, np.arange(3), np.array([1, 2, 3], np.float32)))
    scalars = dict(state.scalars)
    assert counted(rule.init_slices(10, device=CPU))[0] == 0
    count, restored = counted(rule.restore_slices(state))
    assert (count, restored.scalars) == (0, scalars)
