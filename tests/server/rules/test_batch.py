"""Batch rules against their definitions, written out in float64 numpy; nothing is kept per example."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from equipoise_server.rules import Rule, RuleError, Statistics, TableState, aggregate, build
from tests.server.rules.conftest import told

Floats = NDArray[np.float64]
Start = Callable[[Rule, int], TableState]

N = 1000
BATCH_RULES = ["boltzmann", "loss_linear_upper"]


def softmax_mean_one(logits: Floats) -> Floats:
    shares = np.exp(logits)
    return shares / shares.mean()


def boltzmann(values: Floats, rms: float, temperature: float) -> Floats:
    return softmax_mean_one(values / rms / temperature)


def linear_upper(values: Floats, temperature: float) -> Floats:
    """Sow et al., with their δ = 1: h on [-δ, δ], f = min(h + δ, δ)."""
    low, high, delta = values.min(), values.max(), 1.0
    h = 2 * delta * (values - low) / (high - low) - delta
    return softmax_mean_one(np.minimum(h + delta, delta) / temperature)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_weights_follow_the_definition(temperature: float, start: Start) -> None:
    rng = np.random.default_rng(1)
    boltz, upper = (build(name, {"temperature": temperature}) for name in BATCH_RULES)
    boltz_state, upper_state, mean_square = start(boltz, N), start(upper, N), 0.0
    for step in range(20):
        ids = rng.choice(N, 50, replace=False)
        values = ((step + 1) * rng.normal(size=50)).astype(np.float32)
        square = float(np.mean(values.astype(np.float64) ** 2))
        mean_square = 0.99 * mean_square + 0.01 * square if step else square
        for rule, state, expected in (
            (boltz, boltz_state, boltzmann(values.astype(np.float64), math.sqrt(mean_square), temperature)),
            (upper, upper_state, linear_upper(values.astype(np.float64), temperature)),
        ):
            state = rule.update(state, told(rule, ids, values))
            served = rule.answer(state, told(rule, ids, values), ids)
            np.testing.assert_allclose(served, expected, rtol=1e-6, atol=1e-12)
            assert served.astype(np.float64).mean() == pytest.approx(1.0, abs=1e-6)
            effective = expected.sum() ** 2 / (expected**2).sum()
            assert rule.effective_examples(state) == pytest.approx(effective)
            assert rule.effective_ratio(state) == pytest.approx(effective / 50)


@pytest.mark.parametrize("name", BATCH_RULES)
def test_mean_one_over_rows_that_repeat_ids_and_over_unscored_ones(name: str, start: Start) -> None:
    rng = np.random.default_rng(2)
    rule = build(name, {})
    ids, values = rng.integers(0, 20, 64), rng.normal(size=64).astype(np.float32)
    scored = rng.random(64) < 0.6
    assert len(np.setdiff1d(ids, ids[scored])) > 0  # some ids have no scored row at all
    signal = told(rule, None, values)
    statistics = aggregate(ids, signal.contributions, signal.losses, scored)
    state = rule.update(start(rule, N), statistics)
    rows = rule.answer(state, statistics, ids).astype(np.float64)
    assert rows.mean() == pytest.approx(1.0, abs=1e-6)
    assert (rows[~np.isin(ids, ids[scored])] == 1.0).all()
    inside = rows[np.isin(ids, ids[scored])]
    assert inside.std() > 0.1
    assert rule.effective_examples(state) == pytest.approx(inside.sum() ** 2 / (inside**2).sum(), rel=1e-6)
    for one in np.unique(ids):
        assert len(set(rows[ids == one])) == 1


@pytest.mark.parametrize("name", BATCH_RULES)
def test_reads_are_uniform_and_answers_are_one_beyond_the_batch(name: str, start: Start) -> None:
    rng = np.random.default_rng(3)
    rule = build(name, {})
    state = start(rule, N)
    assert rule.effective_examples(state) == N
    ids, values = rng.choice(N, 30, replace=False), rng.normal(size=30).astype(np.float32)
    statistics = told(rule, ids, values)
    state = rule.update(state, statistics)
    everything = rule.answer(state, statistics, None)
    batch = rule.answer(state, statistics, ids)
    np.testing.assert_array_equal(everything[ids], batch)
    assert (np.delete(everything, ids) == 1.0).all()
    asked = rng.integers(0, N, 500)
    np.testing.assert_array_equal(rule.answer(state, statistics, asked), everything[asked])
    assert (rule.weights(state, None) == 1.0).all()
    assert (rule.answer(state, None, ids) == 1.0).all()
    assert np.isnan(rule.scores(state, ids)).all()
    assert (state.scored, state.nbytes, state.num_pages, rule.columns) == (0, 0, 0, {})
    everyone = told(rule, None, rng.normal(size=N).astype(np.float32))
    state = rule.update(state, everyone)
    np.testing.assert_array_equal(rule.answer(state, everyone, asked), rule.answer(state, everyone, None)[asked])


@pytest.mark.parametrize("name", BATCH_RULES)
def test_billions_of_examples_cost_what_the_batch_costs(name: str, start: Start) -> None:
    rule = build(name, {})
    ids = np.array([5, 999_999_999_999, 7])
    statistics = told(rule, ids, np.array([1, 2, 3], np.float32))
    state = rule.update(start(rule, 10**12), statistics)
    assert rule.answer(state, statistics, ids[::-1].copy()).argmax() == 0
    assert rule.effective_examples(state) < 3
    assert 1 / 3 < rule.effective_ratio(state) < 1


@pytest.mark.parametrize("name", BATCH_RULES)
def test_the_ratio_is_of_the_batch_however_many_examples_there_are(name: str, start: Start) -> None:
    """A healthy batch is no collapse, and one that hangs on a single row is one, whatever N is."""
    rule = build(name, {})
    ids = np.arange(64)
    for num_examples in (64, 10**9):
        state = start(rule, num_examples)
        assert rule.effective_ratio(state) == 1.0
        state = rule.update(state, told(rule, ids, np.full(64, 0.5, np.float32)))
        assert rule.effective_ratio(state) == pytest.approx(1.0)
    often = told(rule, np.arange(4).repeat(8), np.linspace(1, 2, 32, dtype=np.float32))
    state = rule.update(start(rule, 4), often)
    assert 0.1 < rule.effective_ratio(state) <= 1.0  # more rows than examples


def test_a_batch_that_hangs_on_one_row_is_a_collapse(start: Start) -> None:
    rule = build("boltzmann", {"temperature": 0.01})
    values = np.zeros(100, np.float32)
    values[7] = 1.0
    state = rule.update(start(rule, N), told(rule, np.arange(100), values))
    assert rule.effective_ratio(state) == pytest.approx(0.01)


def test_outliers_and_ties_of_losses(start: Start) -> None:
    rule = build("loss_linear_upper", {})
    equal = told(rule, np.arange(4), np.full(4, 2.5, np.float32))
    state = rule.update(start(rule, N), equal)
    assert (rule.answer(state, equal, np.arange(4)) == 1.0).all()
    losses = told(rule, np.arange(5), np.array([0, 1, 2, 3, 4], np.float32))
    state = rule.update(state, losses)
    served = rule.answer(state, losses, np.arange(5))
    assert served[2] == served[3] == served[4]
    assert served[2] / served[0] == pytest.approx(math.e)
    assert served[1] / served[0] == pytest.approx(math.sqrt(math.e))


def test_burn_in_is_uniform_and_counts_steps_with_rows(start: Start) -> None:
    rule = build("loss_linear_upper", {"burn_in": 2})
    state = start(rule, N)
    losses = told(rule, np.arange(3), np.array([1, 2, 3], np.float32))
    spread = []
    for step in (losses, Statistics(ids=np.zeros(0, np.int64)), losses, losses):
        state = rule.update(state, step)
        spread.append(float(np.ptp(rule.answer(state, step, np.arange(3)))))
    assert spread[:3] == [0.0, 0.0, 0.0]
    assert spread[3] > 0.5


def test_extreme_contributions_keep_the_mean(start: Start) -> None:
    rule = build("boltzmann", {"temperature": 0.01, "rms_decay": 0.9999})
    state = rule.update(start(rule, N), told(rule, np.arange(2), np.array([1e-30, 1e-30], np.float32)))
    step = told(rule, np.arange(3), np.array([3e38, -3e38, 0], np.float32))
    state = rule.update(state, step)
    assert rule.answer(state, step, np.arange(3)) == pytest.approx([3.0, 0.0, 0.0], abs=1e-15)
    assert rule.effective_examples(state) == pytest.approx(1.0)


@pytest.mark.parametrize("name", BATCH_RULES)
def test_a_step_sent_again_gets_its_weights_again(name: str, start: Start) -> None:
    rng = np.random.default_rng(4)
    rule = build(name, {})
    state, step = start(rule, N), told(rule, np.arange(40), rng.normal(size=40).astype(np.float32))
    state = rule.update(state, step)
    first = rule.answer(state, step, step.ids)
    np.testing.assert_array_equal(rule.answer(state, step, step.ids), first)
    state = rule.update(state, told(rule, np.arange(40), rng.normal(size=40).astype(np.float32)))
    np.testing.assert_allclose(rule.answer(state, step, step.ids), first, rtol=0.05)  # on the scale of now


@pytest.mark.parametrize("name", BATCH_RULES)
@pytest.mark.parametrize("later", [[1e-4, 1e-4], [0.0, 0.0], [1e-30, -1e-30]])
@pytest.mark.parametrize("first", [[1e10, 1.0], [3e38, -3e38]])
def test_a_step_sent_again_is_answered_however_small_the_scale_has_become(
    name: str, first: list[float], later: list[float], start: Start
) -> None:
    rule = build(name, {"rms_decay": 0} if name == "boltzmann" else {})
    state, ids = start(rule, N), np.arange(2)
    step = told(rule, ids, np.array(first, np.float32))
    state = rule.update(state, step)
    state = rule.update(state, told(rule, ids, np.array(later, np.float32)))
    served = rule.answer(state, step, ids)
    assert served.mean() == pytest.approx(1.0)
    assert served[0] >= served[1]  # equal where both are beyond all scale


def test_a_step_itself_is_still_refused_on_a_scale_that_is_not_its_own(start: Start) -> None:
    rule = build("boltzmann", {})
    step = told(rule, np.arange(2), np.array([1e10, 1.0], np.float32))
    with pytest.raises(RuleError, match="does not belong to this step"):
        rule.apply(start(rule, N), step, {"mean_square": 1e-8})
