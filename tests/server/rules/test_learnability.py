"""`learnability` against its definition, computed from all outcomes by themselves, in float64."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from equipoise_server.rules import (
    PAGE_EXAMPLES,
    LoggedStatistics,
    Rule,
    RuleError,
    Statistics,
    TableState,
    aggregate,
    build,
    names,
)
from equipoise_server.rules.sums import product_sum

Floats = NDArray[np.float64]

N = 40
SETTINGS = [
    {},
    {"decay": 0.0, "prior": 1.0, "exploration": 0.0, "floor": 0.1},
    {"decay": 0.9, "prior": 0.1, "exploration": 0.5, "floor": 0.0001},
    {"exploration": 1.0},
    {"floor": 1.0},
]


class Definition:
    """Every outcome is kept, and the weights are made of all of them, one example at a time."""

    def __init__(self, settings: dict[str, float], *, num_examples: int) -> None:
        self.settings = settings
        self.visits: dict[int, list[tuple[float, float]]] = {example: [] for example in range(num_examples)}
        self.last = dict.fromkeys(self.visits, 0)
        self.time = 0

    def step(self, told: Statistics) -> None:
        assert told.successes is not None
        assert told.attempts is not None
        self.time += 1
        ids = list(self.visits) if told.ids is None else told.ids.tolist()
        for example, won, tried in zip(ids, told.successes.tolist(), told.attempts.tolist(), strict=True):
            self.visits[example].append((won, tried - won))
            self.last[example] = self.time

    def counts(self, example: int) -> tuple[float, float]:
        """Successes and failures with the prior's."""
        fades, prior = self.settings["decay"], self.settings["prior"]
        visits = self.visits[example]
        ages = range(len(visits) - 1, -1, -1)
        won, lost = (math.fsum(fades**age * visit[k] for age, visit in zip(ages, visits, strict=True)) for k in (0, 1))
        return won + prior, lost + prior

    def raw(self) -> Floats:
        """max(floor, 4·E[p(1-p)]), the expectation as E[p] - E[p²] of a Beta distribution."""
        found = []
        for example in self.visits:
            a, b = self.counts(example)
            mean = a / (a + b)
            variance = a * b / ((a + b) ** 2 * (a + b + 1.0))
            found.append(max(self.settings["floor"], 4.0 * (mean - (variance + mean * mean))))
        return np.array(found)

    def weights(self) -> Floats:
        raw, share = self.raw(), self.settings["exploration"]
        ages = np.array([self.time - seen for seen in self.last.values()], float)
        by_age = ages / ages.mean() if ages.any() else np.ones(len(ages))
        return (1.0 - share) * raw / raw.mean() + share * by_age

    def scores(self) -> Floats:
        rates = {example: a / (a + b) for example in self.visits for a, b in [self.counts(example)]}
        return np.array([rates[example] if self.visits[example] else np.nan for example in self.visits])


def a_step(random: np.random.Generator, num_examples: int = N, rows: int | None = 8) -> Statistics:
    """Some examples are hard, some easy; groups of 1 to 16 attempts."""
    ids = None if rows is None else random.choice(num_examples, rows, replace=False).astype(np.int64)
    rates = np.linspace(0.0, 1.0, num_examples)[slice(None) if ids is None else ids]
    tried = random.integers(1, 17, len(rates))
    return Statistics(ids=ids, successes=random.binomial(tried, rates).astype(np.int64), attempts=tried)


def begun(given: dict[str, float], num_examples: int = N) -> tuple[Rule, TableState]:
    rule = build("learnability", given)
    return rule, rule.init(num_examples, device=torch.device("cpu"))


def same(left: TableState, right: TableState) -> bool:
    sums = [(s.scored, s.raw_sum, s.raw_square_sum, s.moments, s.scalars) for s in (left, right)]
    return sums[0] == sums[1] and all(left.columns[name].equal(right.columns[name]) for name in left.columns)


def copied(state: TableState) -> TableState:
    columns = {name: column.clone() for name, column in state.columns.items()}
    return replace(state, columns=columns, scalars=dict(state.scalars))


@pytest.mark.parametrize("given", SETTINGS)
def test_it_is_what_its_definition_says(given: dict[str, float]) -> None:
    rule, state = begun(given)
    definition = Definition(dict(rule.settings), num_examples=N)  # type: ignore[arg-type]
    random = np.random.default_rng(1)
    for turn in range(150):
        step = a_step(random, rows=None if turn % 50 == 49 else 8)
        state = rule.update(state, step)
        definition.step(step)
        expected = definition.weights()
        np.testing.assert_allclose(rule.weights(state, None), expected, rtol=2e-6, atol=1e-6)
        assert abs(float(rule.weights(state, None).astype(np.float64).mean()) - 1.0) < 1e-6
        np.testing.assert_allclose(rule.scores(state, None), definition.scores(), rtol=1e-6)
        assert rule.effective_examples(state) == pytest.approx(expected.sum() ** 2 / (expected**2).sum(), rel=1e-6)
    ids = np.array([3, 3, 39], np.int64)
    np.testing.assert_array_equal(rule.weights(state, ids), rule.weights(state, None)[ids])
    np.testing.assert_array_equal(rule.answer(state, step, ids), rule.weights(state, ids))
    state.guard_strength = 0.25
    mixed = 0.75 * expected + 0.25
    np.testing.assert_allclose(rule.weights(state, None), mixed, rtol=2e-6, atol=1e-6)
    assert rule.effective_examples(state) == pytest.approx(mixed.sum() ** 2 / (mixed**2).sum(), rel=1e-6)


def test_what_is_solved_now_and_then_counts_most() -> None:
    rule, state = begun({"exploration": 0.0}, num_examples=4)
    told = Statistics(ids=np.arange(3), successes=np.array([0, 4, 8]), attempts=np.full(3, 8))
    never, half, always, unseen = rule.weights(rule.update(state, told), None)
    assert never == always < unseen < half


def test_the_long_unseen_come_back() -> None:
    rule, state = begun({}, num_examples=4)
    hopeless = Statistics(ids=np.array([0]), successes=np.array([0]), attempts=np.array([16]))
    mixed = Statistics(ids=np.arange(1, 4), successes=np.array([4, 4, 4]), attempts=np.full(3, 8))
    state = rule.update(state, hopeless)
    shares = []
    for _ in range(50):
        state = rule.update(state, mixed)
        shares.append(float(rule.weights(state, np.array([0]))[0]) / 4.0)
    assert min(shares) > 0.1  # all of the exploration's share, and its own


def test_old_outcomes_fade() -> None:
    rule, state = begun({})
    ids = np.array([5])
    for _ in range(20):
        state = rule.update(state, Statistics(ids=ids, successes=np.array([0]), attempts=np.array([8])))
    for _ in range(6):
        state = rule.update(state, Statistics(ids=ids, successes=np.array([8]), attempts=np.array([8])))
    assert float(rule.scores(state, ids)[0]) > 0.9


def test_replay_gives_the_same_bits_page_by_page() -> None:
    num_examples = 2 * PAGE_EXAMPLES + 77
    rule, live = begun({}, num_examples)
    random = np.random.default_rng(2)
    first_page = rule.init(num_examples, device=torch.device("cpu"))
    logged, before = [], copied(live)
    for turn in range(12):
        step = a_step(random, num_examples, rows=300)
        scalars = rule.prepare(live, step)
        pages = np.array([turn >= 5, True, True])  # the first page was stored after five steps
        logged.append(LoggedStatistics(statistics=step, scalars=scalars, pages=pages))
        live = rule.apply(live, step, scalars)
        if turn == 4:
            first_page = copied(live)
    for name, column in before.columns.items():
        column[:PAGE_EXAMPLES] = first_page.columns[name][:PAGE_EXAMPLES]
    before.scalars = dict(first_page.scalars)
    replayed = rule.replay(rule.restore(before), logged)
    assert same(replayed, live)
    assert same(rule.restore(copied(live)), live)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_outcomes_give_a_policy(data: st.DataObject) -> None:
    rule, state = begun({}, num_examples=5)
    for _ in range(data.draw(st.integers(1, 6))):
        ids = np.array(sorted(data.draw(st.sets(st.integers(0, 4), min_size=1))), np.int64)
        tried = np.array(data.draw(st.lists(st.integers(1, 2**52), min_size=len(ids), max_size=len(ids))), np.int64)
        won = np.array([data.draw(st.integers(0, most)) for most in tried.tolist()], np.int64)
        state = rule.update(state, Statistics(ids=ids, successes=won, attempts=tried))
        weights = rule.weights(state, None).astype(np.float64)
        assert (weights > 0).all()
        assert abs(weights.mean() - 1.0) < 1e-6
        assert 1.0 <= rule.effective_examples(state) <= 5.0
        assert same(rule.restore(copied(state)), state)


def test_rows_of_one_id_add_up() -> None:
    rows = aggregate(
        np.array([4, 2, 4, 4]),
        scored=np.array([True, True, True, False]),
        successes=np.array([1, 0, 3, 9]),
        attempts=np.array([2, 5, 3, 9]),
    )
    np.testing.assert_array_equal(rows.ids, [2, 4])
    np.testing.assert_array_equal(rows.successes, [0, 4])
    np.testing.assert_array_equal(rows.attempts, [5, 5])
    distinct = aggregate(
        np.array([4, 2]), scored=np.array([True, False]), successes=np.array([1, 0]), attempts=np.array([2, 0])
    )
    assert (distinct.size, distinct.successes.tolist(), distinct.attempts.tolist()) == (1, [1], [2])  # type: ignore[union-attr]


def test_a_step_without_rows_is_no_time() -> None:
    rule, state = begun({})
    state = rule.update(state, a_step(np.random.default_rng(3)))
    kept = copied(state)
    assert same(rule.update(state, aggregate(np.arange(3))), kept)


@pytest.mark.parametrize(
    ("told", "text"),
    [
        (Statistics(ids=np.arange(2), losses=np.ones(2, np.float32)), "successes is absent: rule learnability"),
        (Statistics(ids=np.arange(2), successes=np.ones(3), attempts=np.ones(3)), "3 values for 2 examples"),
        (Statistics(ids=np.arange(2), successes=np.zeros(2), attempts=np.array([1, 0])), r"successes\[1\] = 0.* of 0"),
        (Statistics(ids=np.arange(2), successes=np.array([2, 1]), attempts=np.ones(2)), r"successes\[0\] = 2 of 1"),
    ],
)
def test_what_it_cannot_take_changes_nothing(told: Statistics, text: str) -> None:
    rule, state = begun({})
    state = rule.update(state, a_step(np.random.default_rng(4)))
    kept = copied(state)
    with pytest.raises(RuleError, match=text):
        rule.update(state, told)
    with pytest.raises(IndexError):
        rule.update(state, Statistics(ids=np.array([0, N]), successes=np.ones(2), attempts=np.ones(2)))
    assert same(state, kept)


@pytest.mark.parametrize("name", [name for name in names() if name not in ("learnability", "uniform")])
def test_other_rules_refuse_outcomes(name: str) -> None:
    rule = build(name, {"rows": 2, "learning_rate": 0.1} if name == "trajectory" else {})
    values = {signal: np.ones(2, np.float32) for signal in rule.signals}
    told = Statistics(ids=np.arange(2), successes=np.ones(2), attempts=np.ones(2), trajectory_row=0, **values)  # type: ignore[arg-type]
    with pytest.raises(RuleError, match=f"successes: rule {name} does not use them"):
        rule.check(told)


def test_uniform_takes_them_and_does_nothing() -> None:
    rule = build("uniform", {})
    state = rule.update(rule.init(N, device=torch.device("cpu")), a_step(np.random.default_rng(5)))
    assert set(rule.weights(state, None).tolist()) == {1.0}


@pytest.mark.parametrize(
    ("column", "row", "value"),
    [("successes", 1, -1.0), ("failures", 2, math.inf), ("raw", 3, 0), ("raw", 3, 2**30 + 1), ("seen", 4, 99)],
)
def test_tables_that_it_never_wrote_are_refused(column: str, row: int, value: float) -> None:
    rule, state = begun({})
    state = rule.update(state, a_step(np.random.default_rng(6), rows=None))
    state.columns[column][row] = value
    with pytest.raises(RuleError, match=rf"state\.{column}\[{row}\]"):
        rule.restore(state)


@pytest.mark.parametrize("time", [-1.0, 0.5, 2.0**31, math.nan])
def test_time_is_a_whole_number(time: float) -> None:
    rule, state = begun({})
    with pytest.raises(RuleError, match="time"):
        rule.apply(state, a_step(np.random.default_rng(7)), {"time": time})


def test_time_stands_still_where_int32_ends() -> None:
    rule, state = begun({})
    state.scalars = {"time": 2.0**31 - 1}
    state = rule.restore(rule.update(state, a_step(np.random.default_rng(8))))
    assert state.scalars == {"time": 2.0**31 - 1}
    assert rule.effective_examples(state) > 1.0


def test_products_are_exact() -> None:
    random = np.random.default_rng(9)
    left, right = (random.integers(0, 2**31, 300_000).astype(np.int32) for _ in range(2))
    expected = sum(a * b for a, b in zip(left.tolist(), right.tolist(), strict=True))
    assert product_sum(torch.from_numpy(left), torch.from_numpy(right)) == expected
