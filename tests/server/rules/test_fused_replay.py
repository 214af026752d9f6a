"""`replay` of many logged steps equals `apply` one after another, to the last bit."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from equipoise_server.rules import (
    PAGE_EXAMPLES,
    LoggedStatistics,
    Rule,
    RuleError,
    SettingValues,
    Statistics,
    TableState,
    build,
    visits,
)
from equipoise_server.rules.visit import VisitRule

Start = Callable[[Rule, int], TableState]

N = 2 * PAGE_EXAMPLES + 50
RULES: list[tuple[str, dict[str, float]]] = [
    ("ema_sign", {}),
    ("ema_sign", {"loss_penalty": 0.7}),
    ("ema_relu", {"loss_penalty": 2.0, "ema_decay": 0.5}),
    ("ema_relu", {}),
    ("exponentiated_gradient", {}),
    ("exponentiated_gradient", {"unit": 0.5, "floor": 0.3}),
    ("rho", {}),
    ("uniform", {}),
    ("projected_gradient", {}),
    ("group_softmax", {}),
    ("exp3", {}),
    ("group_dro", {"adjustment": 1.0}),
    ("excess_loss", {}),
    ("boltzmann", {}),
    ("loss_linear_upper", {}),
]
FUSED = [each for each in RULES if issubclass(type(build(*each)), VisitRule)]


def logged_steps(
    rule: Rule, rng: np.random.Generator, *, steps: int, num_examples: int = N, masked: bool = False, whole: bool = True
) -> list[LoggedStatistics]:
    """Steps as a live run leaves them in the log: a few ids of every page again and again, reports without rows."""
    pool = np.unique(rng.integers(0, num_examples, 40))
    live = rule.init(num_examples, device=torch.device("cpu"))
    found = []
    for index in range(steps):
        ids = None if whole and index == steps // 2 else rng.choice(pool, rng.integers(0, 12), replace=False)
        rows = num_examples if ids is None else len(ids)
        contributions, losses, references = (rng.normal(size=(3, rows)) * np.exp(rng.normal())).astype(np.float32)
        statistics = Statistics(ids=ids, contributions=contributions, losses=losses, reference_losses=references)
        scalars = rule.prepare(live, statistics)
        live = rule.apply(live, statistics, scalars)
        pages = rng.random(live.num_pages) < 0.6 if masked and rng.random() < 0.8 else None
        found.append(LoggedStatistics(statistics=statistics, scalars=scalars, pages=pages))
    return found


def one_by_one(rule: Rule, state: TableState, steps: list[LoggedStatistics]) -> TableState:
    for step in steps:
        state = rule.apply(state, step.statistics, step.scalars, pages=step.pages)
    return state


def bits(state: TableState) -> Any:
    columns = {name: column.numpy().tobytes() for name, column in state.columns.items()}
    scalars = {name: np.float64(value).tobytes() for name, value in state.scalars.items()}
    return columns, (state.scored, state.raw_sum, state.raw_square_sum), scalars


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("name", "settings"), RULES)
@pytest.mark.parametrize("max_rows", [40, 1 << 16])
def test_replay_equals_one_by_one(
    name: str,
    settings: SettingValues,
    masked: bool,
    max_rows: int,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(visits, "MAX_ROWS", max_rows)
    rule = build(name, settings)
    rng = np.random.default_rng([len(name), masked])
    for steps in (2, 25):
        log = logged_steps(rule, rng, steps=steps, masked=masked)
        expected, replayed = start(rule, N), start(rule, N)
        for chunk in (log, log[:3]):  # the tables are no longer new when the second one comes
            expected = one_by_one(rule, expected, chunk)
            replayed = rule.replay(replayed, chunk)
            assert bits(replayed) == bits(expected)
    assert not rule.columns or replayed.scored > 0


@pytest.mark.parametrize(("name", "settings"), FUSED)
def test_thousands_of_rows_are_fused_to_the_same_bits(name: str, settings: SettingValues, start: Start) -> None:
    """Enough rows for the sort by digits, of ids that need more than one."""
    rule, rng = build(name, settings), np.random.default_rng(80)
    log = []
    for _ in range(30):
        ids = rng.choice(N, 500, replace=False)
        ids[:3] = (N - 1, 0, 65_536) if rng.random() < 0.9 else ids[:3]
        ids = np.unique(ids)
        rng.shuffle(ids)
        values = rng.normal(size=(3, len(ids))).astype(np.float32)
        statistics = Statistics(ids=ids, contributions=values[0], losses=values[1], reference_losses=values[2])
        log.append(LoggedStatistics(statistics=statistics, scalars=rule.prepare(start(rule, 1), statistics)))
    assert bits(rule.replay(start(rule, N), log)) == bits(one_by_one(rule, start(rule, N), log))


@pytest.mark.parametrize(("name", "settings"), FUSED)
def test_rows_are_updated_once_a_visit_and_not_once_a_step(
    name: str, settings: SettingValues, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = build(name, settings)
    log = [step for step in logged_steps(rule, np.random.default_rng(81), steps=60) if step.statistics.size]
    whole = next(index for index, step in enumerate(log) if step.statistics.ids is None)
    visited = [np.concatenate([step.statistics.ids for step in part]) for part in (log[:whole], log[whole + 1 :])]
    expected = sum(int(np.unique(ids, return_counts=True)[1].max()) for ids in visited)
    rounds, alone = [], []
    advance, apply = type(rule).advance, type(rule).apply
    monkeypatch.setattr(type(rule), "advance", lambda *given: rounds.append(1) or advance(*given))
    monkeypatch.setattr(type(rule), "apply", lambda *given, **kinds: alone.append(given[2]) or apply(*given, **kinds))
    rule.replay(start(rule, N), log)
    assert alone == [log[whole].statistics]
    assert len(rounds) == expected + 1
    assert expected < len(log) / 2


def test_a_replay_of_nothing_changes_nothing(rule: Rule, start: Start) -> None:
    assert bits(rule.replay(start(rule, N), [])) == bits(start(rule, N))


def test_pages_that_hold_every_step_stay_as_they_are(table_rule: Rule, start: Start) -> None:
    log = logged_steps(table_rule, np.random.default_rng(82), steps=5)
    ahead = [replace(step, pages=np.zeros(3, np.bool_)) for step in log]
    replayed = table_rule.replay(start(table_rule, N), ahead)
    assert bits(replayed)[:2] == bits(start(table_rule, N))[:2]
    assert replayed.scalars == log[-1].scalars


def broken(step: LoggedStatistics, how: str) -> LoggedStatistics:
    statistics = step.statistics
    assert statistics.ids is not None
    if how == "mean square":
        return replace(step, scalars={**step.scalars, "mean_square": 1e-60})
    if how == "negative mean square":
        return replace(step, scalars={**step.scalars, "mean_square": -1.0})
    if how == "mean square of a report":
        empty = Statistics(ids=np.zeros(0, np.int64), contributions=np.zeros(0, np.float32))
        return replace(step, statistics=empty, scalars={**step.scalars, "mean_square": -1.0})
    if how == "length":
        return replace(step, statistics=replace(statistics, contributions=np.ones(3, np.float32)))
    ids = statistics.ids.copy()
    ids[0] = {"id beyond": N, "id below": -1, "id far away": 1 << 62}[how]
    return replace(step, statistics=replace(statistics, ids=ids))


@pytest.mark.parametrize(
    "how",
    [
        "mean square",
        "negative mean square",
        "mean square of a report",
        "length",
        "id beyond",
        "id below",
        "id far away",
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_a_step_that_cannot_be_applied_raises_what_apply_raises(how: str, masked: bool, start: Start) -> None:
    rule = build("ema_sign", {})
    log = [
        step
        for step in logged_steps(rule, np.random.default_rng(83), steps=20, whole=False)
        if step.statistics.size > 3
    ]
    log[4] = broken(log[4], how)
    if masked:
        log = [replace(step, pages=np.array([True, False, True])) for step in log]
    with pytest.raises((RuleError, IndexError)) as expected:
        one_by_one(rule, start(rule, N), log)
    with pytest.raises(type(expected.value)) as raised:
        rule.replay(start(rule, N), log)
    assert str(raised.value) == str(expected.value)


def test_steps_of_uniform_without_contributions_move_no_score(start: Start) -> None:
    rule, rng = build("uniform", {}), np.random.default_rng(84)
    log = logged_steps(rule, rng, steps=8)
    log[3] = replace(log[3], statistics=replace(log[3].statistics, contributions=None))
    assert bits(rule.replay(start(rule, N), log)) == bits(one_by_one(rule, start(rule, N), log))
