"""`trajectory`: against its definition in float64, and what holds for every rule, row by row."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from equipoise_server.rules import PAGE_EXAMPLES, Rule, RuleError, Statistics, TableState, aggregate, build, evidence
from tests.server.rules.test_simplex import quadratic_programme

Floats = NDArray[np.float64]

N, T, EPOCHS, RATE = 30, 5, 4, 2e-2


def make(rows: int = T, *, epochs: int = EPOCHS, rate: float = RATE) -> Rule:
    return build("trajectory", {"rows": rows, "policy_epochs": epochs, "learning_rate": rate})


def start(rule: Rule, num_examples: int = N) -> TableState:
    return rule.init(num_examples, device=torch.device("cpu"))


def told(row: int, contributions: NDArray[np.float32], ids: NDArray[np.int64] | None = None) -> Statistics:
    return Statistics(ids=ids, contributions=contributions, trajectory_row=row)


def contributions(seed: int, size: int = N, scale: float = 1.0) -> NDArray[np.float32]:
    random = np.random.default_rng(seed)
    return (scale * (np.sin(np.arange(size)) + random.normal(size=size))).astype(np.float32)


def copied(state: TableState) -> TableState:
    columns = {name: column.clone() for name, column in state.columns.items()}
    return TableState(num_examples=state.num_examples, columns=columns, scored=state.scored, page_rows=state.page_rows)


def same(left: TableState, right: TableState) -> bool:
    columns = all(left.columns[name].equal(right.columns[name]) for name in left.columns)
    return columns and left.scored == right.scored and left.scalars == right.scalars


def sorted_projection(values: Floats) -> Floats:
    """Onto {γ >= 0, Σγ = 1} by sorting (Duchi et al. 2008, Figure 1)."""
    falling = np.sort(values)[::-1]
    surplus = np.cumsum(falling) - 1.0
    count = np.flatnonzero(falling * np.arange(1, len(values) + 1) > surplus)[-1] + 1
    return np.asarray(np.maximum(values - surplus[count - 1] / count, 0.0))


def test_rows_follow_the_definition_over_policy_epochs() -> None:
    """Backward through the rows, epoch by epoch, with one epoch more than the step size lasts."""
    rule = make()
    state, gamma = start(rule), np.full((T, N), 1.0 / N)
    for epoch in range(EPOCHS + 1):
        for row in reversed(range(T)):
            given = contributions(10 * epoch + row)
            state = rule.update(state, told(row, given))
            if epoch == EPOCHS:
                continue  # a step size of 0: nothing moves
            moved = gamma[row] + RATE * (1.0 - epoch / EPOCHS) * given.astype(np.float64)
            gamma[row] = sorted_projection(moved)
            np.testing.assert_allclose(N * gamma[row], quadratic_programme(N * moved), atol=1e-5)
        served = rule.trajectory_weights(state, slice(0, T), None)
        np.testing.assert_allclose(served, N * gamma, rtol=1e-5, atol=1e-6)
        assert ((served == 0) == (gamma == 0)).all()
        assert 0 < (served == 0).sum() < T * N
        np.testing.assert_allclose(rule.weights(state, None), N * gamma.mean(axis=0), rtol=1e-5, atol=1e-6)
        effective = (1 / np.square(gamma).sum(axis=1)).mean()
        assert rule.effective_examples(state) == pytest.approx(effective, rel=1e-5)
    assert state.columns["updates"].tolist() == [EPOCHS + 1] * T


def test_without_policy_epochs_the_step_size_stays() -> None:
    rule, given = make(1, epochs=0), contributions(1)
    state, gamma = start(rule), np.full(N, 1.0 / N)
    for _ in range(20):
        state = rule.update(state, told(0, given))
        gamma = sorted_projection(gamma + RATE * given.astype(np.float64))
    np.testing.assert_allclose(rule.trajectory_weights(state, slice(0, 1), None)[0], N * gamma, rtol=1e-5, atol=1e-6)


def test_a_step_moves_its_row_alone_and_an_example_at_zero_can_come_back() -> None:
    rule = make(epochs=0, rate=1.0)
    state = start(rule)
    away = np.where(np.arange(N) < 10, -1, 1).astype(np.float32)
    state = rule.update(state, told(2, away))
    row = rule.trajectory_weights(state, slice(2, 3), None)[0]
    np.testing.assert_allclose(row, np.where(np.arange(N) < 10, 0.0, N / 20), rtol=1e-6)
    others = [0, 1, 3, 4]
    assert (rule.trajectory_weights(state, slice(0, T), None)[others] == 1.0).all()
    state = rule.update(state, told(2, -away))
    np.testing.assert_allclose(
        rule.trajectory_weights(state, slice(2, 3), None)[0], np.where(np.arange(N) < 10, N / 10, 0.0), rtol=1e-6
    )


def test_a_step_without_step_size_counts_and_changes_no_bit() -> None:
    rule = make(epochs=1)
    state = rule.update(start(rule), told(0, contributions(2)))
    kept = state.columns["weight"].clone()
    state = rule.update(state, told(0, contributions(3)))
    assert state.columns["weight"].equal(kept)
    assert state.columns["updates"].tolist() == [2, 0, 0, 0, 0]


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2**32)), min_size=1, max_size=5),
    rate=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
    data=st.data(),
)
def test_any_float32_gives_rows_of_mean_one(rows: list[tuple[int, int]], rate: float, data: st.DataObject) -> None:
    rule = make(3, rate=rate)
    state = start(rule, 7)
    for row, _ in rows:
        values = st.floats(width=32, allow_nan=False, allow_infinity=False)
        state = rule.update(state, told(row, data.draw(hnp.arrays(np.float32, 7, elements=values))))
    served = rule.trajectory_weights(state, slice(0, 3), None)
    assert (served >= 0).all()
    np.testing.assert_allclose(served.mean(axis=1, dtype=np.float64), 1.0, atol=1e-6)
    assert 1.0 <= rule.effective_examples(state) <= 7.0
    assert same(rule.restore(copied(state)), state)


@pytest.mark.parametrize("num_examples", [1, 3, 4096, 100_000])
def test_rows_have_mean_one_and_start_at_exactly_one(num_examples: int) -> None:
    rule = make(2, epochs=0, rate=1.0 / num_examples)
    state = start(rule, num_examples)
    assert (rule.weights(state, None) == 1.0).all()
    assert rule.effective_examples(state) == num_examples
    for seed in range(50):
        state = rule.update(state, told(1, contributions(seed, num_examples)))
        mean = rule.trajectory_weights(state, slice(1, 2), None).mean(dtype=np.float64)
        assert abs(mean - 1.0) < 1e-6


def test_threads_do_not_change_a_bit(torch_threads: Callable[[int], None]) -> None:
    states = []
    for threads in (1, 2):
        torch_threads(threads)
        rule = make(2)
        state = start(rule, 100_000)
        for seed in range(4):
            state = rule.update(state, told(seed % 2, contributions(seed, 100_000)))
        states.append((state, rule.weights(state, None), rule.effective_examples(state)))
    assert same(states[0][0], states[1][0])
    np.testing.assert_array_equal(states[0][1], states[1][1])
    assert states[0][2] == states[1][2]


def test_the_order_of_the_ids_is_irrelevant() -> None:
    rule, given = make(), contributions(4)
    order = np.random.default_rng(4).permutation(N)
    expected = rule.update(start(rule), told(1, given))
    assert same(rule.update(start(rule), told(1, given[order], order)), expected)


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        (told(0, np.ones(N - 1, np.float32), np.arange(N - 1)), f"of {N - 1} of {N} examples.*needs all, each scored"),
        (told(0, np.ones(N - 1, np.float32)), f"{N - 1} values for {N} examples"),
        (told(T, np.ones(N, np.float32)), rf"step = {T}: rule trajectory has rows \[0, {T}\)"),
        (Statistics(ids=None, contributions=np.ones(N, np.float32)), "step = None"),
        (told(0, np.where(np.arange(N) == 2, np.nan, 1).astype(np.float32)), r"contributions\[2\] = nan"),
        (told(0, np.where(np.arange(N) == 2, -np.inf, 1).astype(np.float32)), r"contributions\[2\] = -inf"),
        (Statistics(ids=None, losses=np.ones(N, np.float32), trajectory_row=0), "contributions is absent"),
    ],
)
def test_an_unusable_step_changes_nothing(statistics: Statistics, message: str) -> None:
    rule = make()
    state = rule.update(start(rule), told(0, contributions(5)))
    kept = copied(state)
    with pytest.raises(RuleError, match=message):
        rule.update(state, statistics)
    assert same(state, kept)


def test_rows_that_are_not_scored_make_a_step_unusable() -> None:
    rule, scored = make(), np.arange(N) != 7
    partial = aggregate(None, contributions(6), None, scored, trajectory_row=0)
    with pytest.raises(RuleError, match="needs all, each scored"):
        rule.update(start(rule), partial)


def test_an_id_outside_changes_nothing() -> None:
    rule, state = make(), start(make())
    kept = copied(state)
    with pytest.raises(IndexError):
        rule.update(state, told(0, np.ones(N, np.float32), np.arange(1, N + 1)))
    assert same(state, kept)


def test_a_report_without_rows_changes_nothing() -> None:
    rule = make()
    state = rule.update(start(rule), told(0, contributions(7)))
    kept = copied(state)
    assert same(rule.update(state, aggregate(trajectory_row=3)), kept)


def test_answers_hold_the_row_of_the_step_or_read() -> None:
    rule = make()
    state = rule.update(start(rule), step := told(3, contributions(8)))
    row = rule.trajectory_weights(state, slice(3, 4), None)[0]
    ids = np.array([5, 0, 5])
    np.testing.assert_array_equal(rule.answer(state, step, None), row)
    np.testing.assert_array_equal(rule.answer(state, step, ids), row[ids])
    np.testing.assert_array_equal(rule.answer(state, aggregate(trajectory_row=3), ids), row[ids])
    assert rule.answer(state, aggregate(trajectory_row=2), ids).tolist() == [1.0] * 3
    np.testing.assert_array_equal(rule.answer(state, None, ids), rule.weights(state, ids))
    np.testing.assert_array_equal(rule.trajectory_weights(state, slice(2, 4), ids)[1], row[ids])


def test_what_was_served_does_not_move_with_the_table() -> None:
    rule = make()
    state = rule.update(start(rule), told(0, contributions(9)))
    served = rule.trajectory_weights(state, slice(0, 1), None)
    kept = served.copy()
    rule.update(state, told(0, contributions(10)))
    np.testing.assert_array_equal(served, kept)


@pytest.mark.parametrize("rows", [slice(0, 0), slice(-1, 2), slice(3, T + 1)])
def test_rows_outside_are_refused(rows: slice) -> None:
    rule = make()
    with pytest.raises(RuleError, match=rf"rule trajectory has rows \[0, {T}\)"):
        rule.trajectory_weights(start(rule), rows, None)


def test_online_rules_have_no_rows() -> None:
    rule = build("ema_sign", {})
    assert rule.trajectory_rows == 0
    with pytest.raises(RuleError, match="rule ema_sign has no trajectory rows"):
        rule.trajectory_weights(start(rule), slice(0, 1), None)


def test_scores_are_the_mean_weights_once_there_was_a_step() -> None:
    rule = make()
    state = start(rule)
    assert np.isnan(rule.scores(state, None)).all()
    state = rule.update(state, told(0, contributions(11)))
    np.testing.assert_array_equal(rule.scores(state, None), rule.weights(state, None))
    np.testing.assert_array_equal(rule.scores(state, np.array([3])), rule.weights(state, np.array([3])))


def test_evidence_is_that_of_the_step_s_row() -> None:
    """SIM of the paper's section 4 over the examples of non-zero weight, under the weights before the step."""
    rule = make(epochs=0)
    state = rule.update(start(rule), told(1, contributions(12)))
    row = rule.trajectory_weights(state, slice(1, 2), None)[0].astype(np.float64)
    support = row > 0
    assert 2 < support.sum() < N
    given = contributions(13)
    found = evidence(rule, state, told(1, given), {})
    values, weights = given[support].astype(np.float64), row[support]
    mean = (weights * values).sum() / weights.sum()
    deviation = np.sqrt(np.square(values - mean).sum() / (support.sum() - 1))
    assert found.sim == pytest.approx(mean / deviation, rel=1e-9)
    assert found.positive_share == (given > 0).mean()
    assert found.largest_weight == row.max()
    elsewhere = evidence(rule, state, told(0, given), {})
    assert elsewhere.sim == pytest.approx(given.mean(dtype=np.float64) / given.std(ddof=1, dtype=np.float64), rel=1e-6)


@pytest.mark.parametrize("guard", [0.25, 1.0])
def test_the_guard_mixes_with_uniform(guard: float) -> None:
    rule = make()
    state = rule.update(start(rule), told(0, contributions(14)))
    plain = rule.trajectory_weights(state, slice(0, T), None).astype(np.float64)
    state.guard_strength = guard
    mixed = rule.trajectory_weights(state, slice(0, T), None)
    np.testing.assert_allclose(mixed, (1 - guard) * plain + guard, rtol=1e-6)
    np.testing.assert_allclose(rule.weights(state, None), mixed.mean(axis=0), rtol=1e-6)
    effective = (N**2 / np.square(mixed.astype(np.float64)).sum(axis=1)).mean()
    assert rule.effective_examples(state) == pytest.approx(effective, rel=1e-5)


@pytest.mark.parametrize(("num_examples", "page_rows"), [(4096, 16), (3, PAGE_EXAMPLES // 3), (100_000, 1)])
def test_pages_are_whole_rows_of_about_the_usual_size(num_examples: int, page_rows: int) -> None:
    state = start(make(35), num_examples)
    assert state.page_rows == page_rows
    assert state.num_pages == -(-35 // page_rows)
    assert make(35).touched_pages(state, told(34, np.ones(num_examples, np.float32))) == [34 // page_rows]


def test_pages_of_different_versions_replay_to_the_same_bits() -> None:
    """A page skips what it already holds: the step size of a row follows from the row, so that no scalar is needed."""
    size = 30_000  # two rows a page
    rule = make(7)
    state, stored, log = start(rule, size), start(rule, size), []
    versions = [0, 9, 4, 12]
    random = np.random.default_rng(15)
    for version in range(16):
        for page in (page for page, captured in enumerate(versions) if captured == version):
            rows = slice(2 * page, 2 * page + 2)
            for name, column in state.columns.items():
                stored.columns[name][rows] = column[rows]
        step = told(int(random.integers(7)), contributions(version, size))
        state = rule.update(state, step)
        log.append((step, state.scalars))
    for version, (step, scalars) in enumerate(log):
        stored = rule.apply(stored, step, scalars, pages=np.array([version >= captured for captured in versions]))
    assert same(rule.restore(stored), state)


@pytest.mark.parametrize(
    ("column", "row", "value", "message"),
    [
        ("weight", 3, -0.5, r"state.weight\[3\]: rule trajectory only writes weights >= 0 with mean 1"),
        ("weight", 3, 2.0, r"state.weight\[3\]"),
        ("weight", 3, np.nan, r"state.weight\[3\]"),
        ("updates", 3, -1, "state.updates: rule trajectory never writes a negative number"),
    ],
)
def test_tables_that_no_step_can_make_are_refused(column: str, row: int, value: float, message: str) -> None:
    rule = make()
    state = start(rule)
    state.columns[column][row] = value
    with pytest.raises(RuleError, match=message):
        rule.restore(state)


def test_restoring_recomputes_what_follows_from_the_weights() -> None:
    rule = make()
    state = rule.update(start(rule), told(0, contributions(16)))
    expected = copied(state)
    state.columns["effective"].fill_(3.0)
    state.scored = 0
    assert same(rule.restore(state), expected)


def test_tables_of_another_shape_or_type_are_refused() -> None:
    rule = make()
    for name, column in (
        ("weight", torch.ones(T + 1, N)),
        ("updates", torch.zeros(T)),
        ("effective", torch.ones(T, 1)),
    ):
        state = start(rule)
        state.columns[name] = column
        with pytest.raises(RuleError, match=f"state.{name}"):
            rule.restore(state)


def test_a_row_longer_than_a_projection_is_refused() -> None:
    with pytest.raises(RuleError, match="projects at most 1048576 examples") as caught:
        make(1).init((1 << 20) + 1, device=torch.device("meta"))
    assert caught.value.field == "num_examples"


def test_a_row_takes_four_bytes_an_example() -> None:
    rule = make(20)
    state = start(rule, 1000)
    assert {name: column.dtype for name, column in state.columns.items()} == dict(rule.columns)
    assert state.nbytes == 20 * (4 * 1000 + 8)
