"""Restoring: pages of different versions, replayed with the logged scalars, equal the straight run."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from equipoise_server.rules import PAGE_EXAMPLES, Rule, RuleError, Statistics, TableState
from equipoise_server.rules.sources import SourceRule
from equipoise_server.rules.table import TableRule

Start = Callable[[Rule, int], TableState]
MakeStep = Callable[..., Statistics]

N = 3 * PAGE_EXAMPLES - 1000
PAGE_VERSIONS = [4, 0, 7]
STEPS = 10


def _equal(left: TableState, right: TableState) -> bool:
    columns = all(left.columns[key].equal(right.columns[key]) for key in left.columns)
    sums = (left.scored, left.raw_sum, left.raw_square_sum) == (right.scored, right.raw_sum, right.raw_square_sum)
    return columns and sums and left.scalars == right.scalars


def _rows(page: int) -> slice:
    return slice(page * PAGE_EXAMPLES, min((page + 1) * PAGE_EXAMPLES, N))


def test_pages_of_different_versions_replay_to_the_same_bits(rule: Rule, start: Start, make_step: MakeStep) -> None:
    rng = np.random.default_rng(20)
    state, stored, log = start(rule, N), start(rule, N), []
    for version in range(STEPS + 1):
        for page in np.flatnonzero(np.array(PAGE_VERSIONS) == version).tolist():
            for name, column in state.columns.items():
                stored.columns[name][_rows(page)] = column[_rows(page)]
        if version == STEPS:
            break
        step = make_step(rule, rng, N, None if version == 5 else 500)
        if version == 8:  # all rows on one page: the others must still feel a step that touches all rows
            step = make_step(rule, rng, PAGE_EXAMPLES, 300)
        state = rule.update(state, step)
        log.append((step, state.scalars))
    for version, (step, scalars) in enumerate(log):
        pages = np.array([version >= captured for captured in PAGE_VERSIONS])
        stored = rule.apply(stored, step, scalars, pages=pages)
    assert _equal(rule.restore(stored), state)


def test_fork_by_copying_columns_goes_on_alike(rule: Rule, start: Start, make_step: MakeStep) -> None:
    rng = np.random.default_rng(21)
    state = start(rule, 5000)
    for _ in range(5):
        state = rule.update(state, make_step(rule, rng, 5000, 100))
    fork = start(rule, 5000)
    for name, column in state.columns.items():
        fork.columns[name].copy_(column)
    fork.scalars = dict(state.scalars)
    fork = rule.restore(fork)
    assert _equal(fork, state)
    step = make_step(rule, rng, 5000, 100)
    assert _equal(rule.update(fork, step), rule.update(state, step))


@pytest.mark.parametrize("below", [True, False])
def test_raw_weight_out_of_range_is_refused(table_rule: Rule, below: bool, start: Start) -> None:
    assert isinstance(table_rule, TableRule)
    state = start(table_rule, 100)
    raw = -2 if below else table_rule.raw_range[1] + 1
    state.columns["raw"][42] = raw
    with pytest.raises(RuleError, match=rf"state.raw\[42\] = {raw}.*{table_rule.name}"):
        table_rule.restore(state)


def test_statistic_that_is_not_finite_is_refused(table_rule: Rule, start: Start) -> None:
    state = start(table_rule, 100)
    statistic = next(name for name in table_rule.columns if name != "raw")
    state.columns[statistic][7] = torch.nan
    with pytest.raises(RuleError, match=rf"state.{statistic}\[7\] = nan"):
        table_rule.restore(state)


def test_column_of_another_shape_or_type_is_refused(table_rule: Rule, start: Start) -> None:
    for column in (torch.zeros(99), torch.zeros(100, dtype=torch.float64)):
        state = start(table_rule, 100)
        name = next(name for name in table_rule.columns if name != "raw")
        state.columns[name] = column
        with pytest.raises(RuleError, match=f"state.{name}"):
            table_rule.restore(state)


def test_scalar_that_is_not_finite_is_refused(rule: Rule, start: Start) -> None:
    state = start(rule, 100)
    name = "sources" if isinstance(rule, SourceRule) else "mean_square"
    state.scalars = {name: float("nan")}
    with pytest.raises(RuleError, match=name):
        rule.restore(state)
