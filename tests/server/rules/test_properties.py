"""What holds for every online rule."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from equipoise_server.rules import Rule, RuleError, Statistics, TableState, aggregate, build
from equipoise_server.rules.sources import SourceRule
from tests.server.rules.conftest import ONLINE, told

Start = Callable[[Rule, int], TableState]
MakeStep = Callable[..., Statistics]

N = 60


def _check_policy(rule: Rule, state: TableState) -> None:
    weights = rule.weights(state, None)
    assert np.isfinite(weights).all()
    assert (weights >= 0).all()
    assert abs(weights.astype(np.float64).mean() - 1.0) < 1e-6
    assert 1.0 <= rule.effective_examples(state) <= state.num_examples


def reordered(step: Statistics, order: NDArray[np.int64]) -> Statistics:
    """The same rows in another order."""
    columns = ("ids", "contributions", "losses", "reference_losses")
    given = {name: getattr(step, name) for name in columns}
    return Statistics(**{name: None if values is None else values[order] for name, values in given.items()})


def _same(left: TableState, right: TableState) -> bool:
    columns = all(left.columns[key].equal(right.columns[key]) for key in left.columns)
    sums = (left.scored, left.raw_sum, left.raw_square_sum) == (right.scored, right.raw_sum, right.raw_square_sum)
    return columns and sums and left.scalars == right.scalars


def _copy(state: TableState) -> TableState:
    return TableState(
        num_examples=state.num_examples,
        columns={name: column.clone() for name, column in state.columns.items()},
        scalars=dict(state.scalars),
        scored=state.scored,
        raw_sum=state.raw_sum,
        raw_square_sum=state.raw_square_sum,
        guard_strength=state.guard_strength,
    )


def test_mean_one_after_ten_thousand_steps(rule: Rule, start: Start) -> None:
    rng = np.random.default_rng(5)
    state = start(rule, N)
    ids = rng.permuted(np.tile(np.arange(N), (10_000, 1)), axis=1)[:, :8].copy()
    scales = np.exp(rng.normal(size=(10_000, 1)) * 3)
    signals = (rng.normal(size=(10_000, 8)) * scales).astype(np.float32)
    for step in range(10_000):
        state = rule.update(state, told(rule, ids[step], signals[step]))
        if step % 500 == 0:
            _check_policy(rule, state)
    _check_policy(rule, state)
    kept = _copy(state)
    assert _same(rule.restore(state), kept)


@pytest.mark.parametrize("name", ONLINE)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_float32_gives_a_policy(name: str, data: st.DataObject) -> None:
    rule = build(name, {})
    state = rule.init(7, device=torch.device("cpu"))
    values = st.floats(width=32, allow_nan=False, allow_infinity=False)
    for _ in range(data.draw(st.integers(1, 5))):
        ids = data.draw(hnp.arrays(np.int64, st.integers(0, 7), elements=st.integers(0, 6), unique=True))
        state = rule.update(state, told(rule, ids, data.draw(hnp.arrays(np.float32, len(ids), elements=values))))
        _check_policy(rule, state)
        scores = rule.scores(state, None)
        assert np.isfinite(scores[~np.isnan(scores)]).all()
        assert np.isnan(scores).sum() == 7 - state.scored


@pytest.mark.parametrize("scale", [1e-30, 2.0**-90, 1e-3, 7.0, 2.0**100, 1e30])
def test_scale_of_the_signal_is_irrelevant(rule: Rule, scale: float, start: Start, make_step: MakeStep) -> None:
    if isinstance(rule, SourceRule):
        return  # sources are compared in nats
    plain, large = start(rule, N), start(rule, N)
    for seed in range(60):
        step = make_step(rule, np.random.default_rng(seed), N, 20)
        scaled = make_step(rule, np.random.default_rng(seed), N, 20, scale=scale)
        plain, large = rule.update(plain, step), rule.update(large, scaled)
    answers = [rule.answer(*told, None) for told in ((plain, step), (large, scaled))]
    np.testing.assert_allclose(*answers, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rule.weights(large, None), rule.weights(plain, None), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rule.scores(large, None), rule.scores(plain, None), rtol=1e-5, atol=1e-6)
    if np.log2(scale) % 1 == 0:
        same = [name for name in plain.columns if name != "loss"]  # losses are kept as they are
        assert all(plain.columns[name].equal(large.columns[name]) for name in same)


def test_row_order_is_irrelevant(rule: Rule, start: Start, make_step: MakeStep) -> None:
    rng = np.random.default_rng(6)
    straight, shuffled = start(rule, N), start(rule, N)
    for _ in range(60):
        step = make_step(rule, rng, N, 25)
        order = rng.permutation(25)
        straight = rule.update(straight, step)
        shuffled = rule.update(shuffled, mixed := reordered(step, order))
    answers = [rule.answer(*told, None) for told in ((straight, step), (shuffled, mixed))]
    np.testing.assert_allclose(*answers, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(rule.weights(shuffled, None), rule.weights(straight, None), rtol=1e-6, atol=1e-6)


def test_repeated_ids_count_as_their_mean(rule: Rule, start: Start) -> None:
    signal = told(rule, None, np.array([1, -2, 5, 9], np.float32))
    rows = aggregate(
        np.array([3, 1, 3, 3]),
        signal.contributions,
        signal.losses,
        np.array([True, True, True, False]),
        reference_losses=signal.reference_losses,
    )
    means = replace(told(rule, np.array([1, 3]), np.array([-2, 3], np.float32)), counts=np.array([1, 3]))
    assert _same(rule.update(start(rule, N), rows), rule.update(start(rule, N), means))


def test_all_examples_equal_their_ids_in_order(rule: Rule, start: Start, make_step: MakeStep) -> None:
    step = make_step(rule, np.random.default_rng(7), N, None)
    named = replace(step, ids=np.arange(N))
    assert _same(rule.update(start(rule, N), step), rule.update(start(rule, N), named))


def test_step_without_rows_changes_no_table(rule: Rule, start: Start, make_step: MakeStep) -> None:
    state = rule.update(start(rule, N), make_step(rule, np.random.default_rng(8), N, 20))
    kept = _copy(state)
    for empty in (aggregate(None, None, None, None), Statistics(ids=None), aggregate(np.arange(3), None, None, None)):
        state = rule.update(state, empty)
        assert _same(state, kept)


def test_threads_and_position_do_not_change_a_bit(
    rule: Rule, start: Start, make_step: MakeStep, torch_threads: Callable[[int], None]
) -> None:
    num_examples, rows = 150_000, 120_001
    states = []
    for threads in (1, 2):
        torch_threads(threads)
        rng = np.random.default_rng(9)
        state = start(rule, num_examples)
        for _ in range(3):
            state = rule.update(state, make_step(rule, rng, num_examples, rows))
        states.append(state)
    assert _same(*states)

    step = make_step(rule, rng, num_examples, rows)
    backwards = reordered(step, np.arange(rows)[::-1])
    scalars = rule.prepare(states[0], step)
    assert _same(rule.apply(states[0], step, scalars), rule.apply(states[1], backwards, scalars))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_step_that_is_not_finite_changes_nothing(rule: Rule, bad: float, start: Start, make_step: MakeStep) -> None:
    state = rule.update(start(rule, N), make_step(rule, np.random.default_rng(10), N, 20))
    kept = _copy(state)
    with pytest.raises(RuleError, match=rf"(contributions|losses)\[2\] = {bad}.*{rule.name}"):
        rule.update(state, told(rule, np.arange(4), np.array([1, 2, bad, bad], np.float32)))
    assert _same(state, kept)


def test_step_with_an_unknown_id_changes_nothing(rule: Rule, start: Start, make_step: MakeStep) -> None:
    state = rule.update(start(rule, N), make_step(rule, np.random.default_rng(11), N, 20))
    kept = _copy(state)
    with pytest.raises(IndexError):
        rule.update(state, told(rule, np.array([0, N]), np.ones(2, np.float32)))
    assert _same(state, kept)


@pytest.mark.parametrize("mean_square", [np.nan, np.inf, -1.0, 1e-60])
def test_step_with_foreign_scalars_changes_nothing(
    scaling_rule: Rule, mean_square: float, start: Start, make_step: MakeStep
) -> None:
    rule = scaling_rule
    if rule.name == "strata" and mean_square == 1e-60:
        return  # no mean square is too small for a step: `strata` holds what is beyond its scale
    step = make_step(rule, np.random.default_rng(12), N, 20)
    state = rule.update(start(rule, N), step)
    kept = _copy(state)
    with pytest.raises(RuleError, match="mean_square"):
        rule.apply(state, step, {**state.scalars, "mean_square": mean_square})
    assert _same(state, kept)


@pytest.mark.parametrize("threshold", [np.nan, np.inf, 0.5, 2.0**53])
def test_threshold_must_be_an_exact_integer(threshold: float, start: Start, make_step: MakeStep) -> None:
    rule = build("projected_gradient", {})
    step = make_step(rule, np.random.default_rng(13), N, 20)
    state = rule.update(start(rule, N), step)
    kept = _copy(state)
    with pytest.raises(RuleError, match="threshold"):
        rule.apply(state, step, {**state.scalars, "threshold": threshold})
    assert _same(state, kept)


def test_wrong_number_of_values_is_refused(rule: Rule, start: Start) -> None:
    with pytest.raises(RuleError, match="3 values for 2 examples"):
        rule.update(start(rule, N), told(rule, np.arange(2), np.ones(3, np.float32)))


@pytest.mark.parametrize("name", [name for name in ONLINE if name not in ("strata", "uniform")])
def test_every_signal_is_required(name: str) -> None:
    rule = build(name, {})
    other = "losses" if rule.signals == ("contributions",) else "contributions"
    for missing in rule.signals:
        given = {signal: np.ones(2, np.float32) for signal in (*rule.signals, other) if signal != missing}
        with pytest.raises(RuleError, match=f"{missing} is absent: rule {name}") as caught:
            rule.check(Statistics(ids=np.arange(2), **given))
        assert caught.value.field == missing


@pytest.mark.parametrize("name", ONLINE)
def test_reference_losses_are_refused_where_they_would_be_for_nothing(name: str) -> None:
    rule, ones = build(name, {}), np.ones(2, np.float32)
    everything = Statistics(ids=np.arange(2), contributions=ones, losses=ones, reference_losses=ones)
    if name in ("excess_loss", "rho", "uniform"):
        rule.check(everything)
    else:
        with pytest.raises(RuleError, match=f"rule {name} does not use them") as caught:
            rule.check(everything)
        assert caught.value.field == "reference_losses"


def test_prepare_changes_nothing(rule: Rule, start: Start, make_step: MakeStep) -> None:
    rng = np.random.default_rng(14)
    state = rule.update(start(rule, N), make_step(rule, rng, N, 20))
    kept = _copy(state)
    rule.prepare(state, make_step(rule, rng, N, 20))
    assert _same(state, kept)


def test_tables_take_at_most_sixteen_bytes_per_example(rule: Rule, start: Start) -> None:
    state = start(rule, 1000)
    assert {name: column.dtype for name, column in state.columns.items()} == dict(rule.columns)
    assert state.nbytes <= 16 * 1000


def test_a_loss_penalty_lowers_what_surprises_and_needs_losses(start: Start) -> None:
    rule = build("ema_sign", {"loss_penalty": 2.0})
    assert rule.signals == ("contributions", "losses")
    with pytest.raises(RuleError, match="losses is absent: rule ema_sign needs it in every step"):
        rule.check(Statistics(ids=None, contributions=np.ones(N, np.float32)))
    losses = np.linspace(0, 5, N, dtype=np.float32)
    state = rule.update(start(rule, N), Statistics(ids=None, contributions=np.ones(N, np.float32), losses=losses))
    scores = rule.scores(state, None)
    assert (np.diff(scores) < 0).all()
    np.testing.assert_array_equal(rule.above_floor(state, None), scores > 0)
    assert 0 < rule.above_floor(state, None).sum() < N


def test_a_loss_penalty_does_not_mind_the_scale_of_losses(start: Start) -> None:
    rng = np.random.default_rng(13)
    rule = build("ema_sign", {"loss_penalty": 1.0})
    plain, scaled = start(rule, N), start(rule, N)
    for _ in range(20):
        c, losses = rng.normal(size=N).astype(np.float32), rng.random(N).astype(np.float32)
        plain = rule.update(plain, Statistics(ids=None, contributions=c, losses=losses))
        scaled = rule.update(scaled, Statistics(ids=None, contributions=c, losses=losses * np.float32(1024)))
    np.testing.assert_allclose(rule.scores(scaled, None), rule.scores(plain, None), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "value"), [("loss_mean", np.nan), ("loss_variance", -1.0), ("loss_variance", np.inf)])
def test_an_impossible_loss_moment_is_refused(start: Start, name: str, value: float) -> None:
    rule = build("ema_sign", {"loss_penalty": 1.0})
    state = start(rule, N)
    state.scalars = {name: value}
    with pytest.raises(RuleError, match=f"{name} = "):
        rule.restore(state)
