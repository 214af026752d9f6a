"""Each rule against its definition, written out once more in float64 numpy."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from equipoise_server.rules import Rule, Statistics, TableState, build
from tests.server.rules.conftest import told

Floats = NDArray[np.float64]

N = 300
STEPS = 80
ROWS = 40

CASES: list[tuple[str, dict[str, float]]] = [
    ("uniform", {}),
    ("ema_sign", {}),
    ("ema_sign", {"threshold": 0.3, "floor": 0.0, "ema_decay": 0.5, "rms_decay": 0.0}),
    ("ema_relu", {}),
    ("ema_relu", {"saturation": 0.5, "floor": 0.1, "ema_decay": 0.0, "rms_decay": 0.9999}),
    ("ema_sign", {"loss_penalty": 3.0, "rms_decay": 0.8}),
    ("ema_relu", {"loss_penalty": 0.5, "saturation": 0.5, "rms_decay": 0.0}),
    ("exponentiated_gradient", {}),
    ("exponentiated_gradient", {"learning_rate": 1.0, "decay": 0.0, "floor": 1e-4}),
    ("exponentiated_gradient", {"learning_rate": 0.2, "unit": 3.0}),
    ("rho", {}),
    ("rho", {"threshold": -0.2, "saturation": 0.3, "floor": 0.05, "ema_decay": 0.7}),
    ("projected_gradient", {}),
    ("projected_gradient", {"step_size": 2.0, "floor": 0.2, "cap": 2.0}),
    ("projected_gradient", {"step_size": 10.0, "cap": 3.0}),
]


class Definition:
    """State of a policy as DESIGN writes it: means, averages and exponentials over whole vectors."""

    def __init__(self, name: str, settings: Mapping[str, float], *, num_examples: int = N) -> None:
        self.name, self.settings = name, settings
        self.seen = np.zeros(num_examples, bool)
        self.statistic = np.zeros(num_examples)
        self.weights = np.ones(num_examples)
        self.mean_square = 0.0
        self.loss_moments: tuple[float, float] | None = None

    def step(self, statistics: Statistics) -> None:
        ids = np.arange(len(self.seen)) if statistics.ids is None else statistics.ids
        values = self._signal(statistics)
        squares, decay = float(np.mean(values**2)), self.settings["rms_decay"]
        self.mean_square = decay * self.mean_square + (1 - decay) * squares if self.mean_square else squares
        signal = values / (self.settings.get("unit") or math.sqrt(self.mean_square) or 1.0)
        if penalty := self.settings.get("loss_penalty"):
            signal = signal - penalty * self._surprise(statistics)
        first = ~self.seen[ids]
        self.seen[ids] = True
        if self.name == "exponentiated_gradient":
            self._exponentiated(ids, signal)
        else:
            ema = self.settings["ema_decay"]
            self.statistic[ids] = np.where(first, signal, ema * self.statistic[ids] + (1 - ema) * signal)
        if self.name == "projected_gradient":
            self._projected(ids, signal)
        else:
            raw = self._raw()[self.seen]
            self.weights[self.seen] = raw / raw.mean() if raw.any() else 1.0

    def _surprise(self, statistics: Statistics) -> Floats:
        """How many standard deviations each loss is above the mean, both running."""
        assert statistics.losses is not None
        losses, decay = statistics.losses.astype(np.float64), self.settings["rms_decay"]
        if self.loss_moments is None:
            mean, variance = losses.mean(), losses.var()
        else:
            mean = decay * self.loss_moments[0] + (1 - decay) * losses.mean()
            variance = decay * self.loss_moments[1] + (1 - decay) * ((losses - mean) ** 2).mean()
        self.loss_moments = mean, variance
        return (losses - mean) / math.sqrt(variance)

    def _signal(self, statistics: Statistics) -> Floats:
        if self.name == "rho":
            assert statistics.losses is not None
            assert statistics.reference_losses is not None
            return statistics.losses.astype(np.float64) - statistics.reference_losses
        assert statistics.contributions is not None
        return statistics.contributions.astype(np.float64)

    def _exponentiated(self, ids: NDArray[np.int64], signal: Floats) -> None:
        limit = abs(math.log(self.settings["floor"])) / 2
        moved = (1 - self.settings["decay"]) * self.statistic[ids] + self.settings["learning_rate"] * signal
        self.statistic[ids] = np.clip(moved, -limit, limit)

    def _raw(self) -> Floats:
        floor = self.settings.get("floor", 1.0)
        if self.name == "ema_sign":
            return np.where(self.statistic > self.settings["threshold"], 1.0, floor)
        if self.name == "ema_relu":
            share = np.minimum(np.maximum(self.statistic, 0) / self.settings["saturation"], 1)
            return floor + (1 - floor) * share
        if self.name == "rho":
            share = (self.statistic - self.settings["threshold"]) / self.settings["saturation"]
            return floor + (1 - floor) * np.clip(share, 0, 1)
        if self.name == "exponentiated_gradient":
            return math.sqrt(floor) * np.exp(self.statistic)
        return np.ones(len(self.seen))

    def _projected(self, ids: NDArray[np.int64], signal: Floats) -> None:
        self.weights[ids] += self.settings["step_size"] * signal
        moved, floor, cap = self.weights[self.seen], self.settings["floor"], self.settings["cap"]
        low, high = moved.min() - cap, moved.max() - floor
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if np.clip(moved - middle, floor, cap).mean() > 1 else (low, middle)
        self.weights[self.seen] = np.clip(moved - low, floor, cap)


def _numbers(rule: Rule) -> dict[str, float]:
    return {key: float(value) for key, value in rule.settings.items()}


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_state_and_weights_follow_the_definition(
    name: str,
    settings: dict[str, float],
    start: Callable[[Rule, int], TableState],
    make_step: Callable[..., Statistics],
) -> None:
    rng = np.random.default_rng(1)
    rule = build(name, settings)
    definition, state = Definition(name, _numbers(rule)), start(rule, N)
    for index in range(STEPS):
        statistics = make_step(rule, rng, N, None if index == STEPS // 2 else ROWS, scale=1.0 + index)
        if statistics.losses is not None and statistics.reference_losses is not None:
            shift = rng.normal(size=len(statistics.losses)).astype(np.float32)
            statistics = replace(statistics, losses=statistics.losses + shift, reference_losses=shift)
        elif statistics.losses is not None:
            statistics = replace(statistics, losses=np.abs(rng.normal(size=len(statistics.losses))).astype(np.float32))
        definition.step(statistics)
        state = rule.update(state, statistics)
        decided = np.abs(definition.statistic - settings.get("threshold", 0.0)) > 1e-6
        assert decided[definition.seen].all(), "the seed must keep clear of the threshold"
        np.testing.assert_allclose(rule.weights(state, None), definition.weights, rtol=1e-5, atol=1e-8)
        expected = np.where(definition.seen, definition.statistic, np.nan)
        np.testing.assert_allclose(rule.scores(state, None), expected, rtol=1e-5, atol=1e-6)
    assert state.scored == definition.seen.sum()
    weights = definition.weights
    assert rule.effective_examples(state) == pytest.approx(weights.sum() ** 2 / (weights**2).sum(), rel=1e-6)
    if name == "ema_sign":
        assert 0 < (weights < 1).sum() < N


@pytest.mark.parametrize("guard", [0.0, 0.25, 1.0])
def test_guard_mixes_with_uniform(
    rule: Rule, guard: float, start: Callable[[Rule, int], TableState], make_step: Callable[..., Statistics]
) -> None:
    rng = np.random.default_rng(2)
    state = start(rule, N)
    for _ in range(200 if rule.name == "strata" else 20):
        step = make_step(rule, rng, N, ROWS)
        if step.contributions is not None and step.losses is not None:  # what strata of losses differ by
            step = replace(step, contributions=step.contributions + step.losses)
        state = rule.update(state, step)
    ids = None if rule.columns else step.ids
    free = rule.answer(state, step, ids).astype(np.float64)
    assert np.ptp(free) > 0 or rule.name in ("exp3", "uniform")  # exp3 explores first
    state.guard_strength = guard
    mixed = rule.answer(state, step, ids).astype(np.float64)
    np.testing.assert_allclose(mixed, (1 - guard) * free + guard, rtol=1e-6)
    assert rule.effective_examples(state) == pytest.approx(mixed.sum() ** 2 / (mixed**2).sum(), rel=1e-6)


def test_unscored_examples_are_served_exactly_one(
    rule: Rule, start: Callable[[Rule, int], TableState], make_step: Callable[..., Statistics]
) -> None:
    statistics = make_step(rule, np.random.default_rng(3), N, ROWS)
    assert statistics.ids is not None
    state = rule.update(start(rule, N), statistics)
    state.guard_strength = 0.3
    rest = np.setdiff1d(np.arange(N), statistics.ids)
    for read in (rule.weights(state, rest), rule.answer(state, statistics, rest)):
        assert (read == 1.0).all()
    assert np.isnan(rule.scores(state, rest)).all()
    assert rule.above_floor(state, rest).all()


def test_reads_by_id_equal_reads_of_all(
    rule: Rule, start: Callable[[Rule, int], TableState], make_step: Callable[..., Statistics]
) -> None:
    rng = np.random.default_rng(4)
    state = rule.update(start(rule, N), make_step(rule, rng, N, ROWS))
    ids = rng.integers(0, N, 1000)
    for read in (rule.weights, rule.scores, rule.above_floor):
        np.testing.assert_array_equal(read(state, ids), read(state, None)[ids])


def test_weights_are_one_when_nothing_has_raw_weight(start: Callable[[Rule, int], TableState]) -> None:
    rule = build("ema_sign", {"floor": 0})
    all_bad = Statistics(ids=np.arange(3), contributions=np.full(3, -1, np.float32))
    state = rule.update(start(rule, 5), all_bad)
    assert (rule.weights(state, None) == 1.0).all()
    assert rule.effective_examples(state) == 5.0
    assert rule.above_floor(state, None).tolist() == [False, False, False, True, True]


def test_zero_contributions_leave_the_scale_unset(scaling_rule: Rule, start: Callable[[Rule, int], TableState]) -> None:
    rule = scaling_rule
    zeros = told(rule, np.arange(4), np.zeros(4, np.float32))
    state = rule.update(start(rule, 8), zeros)
    assert state.scalars["mean_square"] == 0.0
    assert (rule.answer(state, zeros, None) == 1.0).all()
    if rule.columns:
        assert (rule.scores(state, np.arange(4)) == 0.0).all()
    state = rule.update(state, told(rule, np.arange(4), np.full(4, 3, np.float32)))
    assert state.scalars["mean_square"] == 9.0


def test_full_weight_needs_more_than_the_threshold(start: Callable[[Rule, int], TableState]) -> None:
    for threshold, contributions in ((0.0, [0.0, 1.0]), (1.0, [1.0, -1.0])):
        rule = build("ema_sign", {"threshold": threshold})
        step = Statistics(ids=np.arange(2), contributions=np.array(contributions, np.float32))
        assert not rule.above_floor(rule.update(start(rule, 2), step), np.array([0])).any()


def test_uniform_takes_steps_without_contributions(start: Callable[[Rule, int], TableState]) -> None:
    rule = build("uniform", {})
    state = rule.update(start(rule, 8), Statistics(ids=np.arange(4), losses=np.ones(4, np.float32)))
    assert (rule.weights(state, None) == 1.0).all()
    assert state.scored == 0
