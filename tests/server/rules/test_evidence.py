import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from equipoise_server.rules import Evidence, Rule, Statistics, TableState, build, evidence
from tests.server.rules.conftest import told

Start = Callable[[Rule, int], TableState]
MakeStep = Callable[..., Statistics]

N = 50


def shown_by(rule: Rule, step: Statistics, state: TableState | None = None) -> Evidence:
    """Evidence of a step with rows, by default a policy's first."""
    state = state or rule.init(N, device=torch.device("cpu"))
    shown = evidence(rule, state, step, rule.prepare(state, step))
    assert shown is not None
    return shown


def test_sim_is_the_formula_of_the_paper(rule: Rule, start: Start, make_step: MakeStep) -> None:
    """Section 4: mean Σγ·CT over those with γ ≠ 0, over the deviation from it with divisor (count - 1)."""
    rng = np.random.default_rng(40)
    state = start(rule, N)
    for _ in range(10):
        state = rule.update(state, make_step(rule, rng, N, 20)) if rule.columns else state
    step = replace(make_step(rule, rng, N, 20), contributions=rng.normal(size=20).astype(np.float32))
    assert step.ids is not None
    assert step.contributions is not None
    served, above = rule.weights(state, step.ids), rule.above_floor(state, step.ids)
    if not rule.columns:  # a batch rule: the weights that this very step gets
        served = rule.answer(rule.update(start(rule, N), step), step, step.ids)
    pairs = [
        (float(weight), float(contribution))
        for weight, contribution, counts in zip(served, step.contributions, above, strict=True)
        if counts
    ]
    mass = sum(weight for weight, _ in pairs)
    mean = sum(weight / mass * contribution for weight, contribution in pairs)
    variance = sum((contribution - mean) ** 2 for _, contribution in pairs) / (len(pairs) - 1)
    shown = shown_by(rule, step, state)
    assert shown.sim == pytest.approx(mean / math.sqrt(variance), rel=1e-12)
    assert shown.positive_share == (step.contributions > 0).sum() / 20
    assert shown.largest_weight == served.max()


def test_rows_at_the_floor_do_not_count_for_sim(start: Start) -> None:
    rule = build("ema_sign", {})
    first = Statistics(ids=np.arange(3), contributions=np.array([1, 1, -1], np.float32))
    state = rule.update(start(rule, N), first)
    step = Statistics(ids=np.arange(4), contributions=np.array([1, 2, -50, 3], np.float32))
    shown = shown_by(rule, step, state)
    weights = rule.weights(state, np.array([0, 1, 3])).astype(np.float64)
    values = np.array([1.0, 2.0, 3.0])
    mean = (weights * values).sum() / weights.sum()
    assert shown.sim == pytest.approx(mean / math.sqrt(((values - mean) ** 2).sum() / 2))
    assert shown.positive_share == 0.75


@pytest.mark.parametrize("contributions", [[0.3], [0.3, 0.3, 0.3], [0.0, 0.0], [3e38, 3e38]])
def test_sim_is_absent_without_a_difference(contributions: list[float], rule: Rule) -> None:
    ids = np.arange(len(contributions))
    values = np.array(contributions, np.float32)
    step = replace(told(rule, ids, values), contributions=values)
    shown = shown_by(rule, step)
    assert shown.sim is None
    assert shown.positive_share == float(contributions[0] > 0)
    assert shown.largest_weight == 1.0


def test_extreme_contributions_give_finite_evidence(rule: Rule) -> None:
    for values in ([3e38, -3e38, 1e38], [1e-45, -1e-45, 0]):
        contributions = np.resize(values, N).astype("f4")
        shown = shown_by(rule, replace(told(rule, None, contributions), contributions=contributions))
        assert shown.sim is not None
        assert math.isfinite(shown.sim)


def test_step_without_rows_shows_nothing(rule: Rule) -> None:
    state, none = rule.init(N, device=torch.device("cpu")), np.zeros(0, np.float32)
    for step in (
        Statistics(ids=np.zeros(0, np.int64)),
        Statistics(ids=np.zeros(0, np.int64), contributions=none, losses=none, reference_losses=none),
    ):
        assert evidence(rule, state, step, rule.prepare(state, step)) is None


def test_losses_alone_show_the_largest_weight() -> None:
    rule = build("uniform", {})
    shown = shown_by(rule, Statistics(ids=np.arange(2), losses=np.ones(2, np.float32)))
    assert (shown.sim, shown.positive_share, shown.largest_weight) == (None, None, 1.0)
