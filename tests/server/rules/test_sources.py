"""The rules for mixing sources, each against its paper's algorithm box in float64, share by share; and what they do."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from equipoise_server.rules import (
    LoggedStatistics,
    Rule,
    RuleError,
    Statistics,
    TableState,
    aggregate,
    build,
)

Floats = NDArray[np.float64]
Start = Callable[[Rule, int], TableState]
Given = Mapping[str, float | bool | str]

N = 12
CASES: list[tuple[str, dict[str, float]]] = [
    ("group_softmax", {}),
    ("group_softmax", {"loss_decay": 0.0, "temperature": 0.2, "floor": 1e-4}),
    ("group_softmax", {"floor": 1.0}),
    ("exp3", {}),
    ("exp3", {"reward_decay": 0.5, "temperature": 0.1, "floor": 0.3}),
    ("group_dro", {}),
    ("group_dro", {"learning_rate": 0.7, "adjustment": 2.0, "floor": 1e-4}),
    ("excess_loss", {}),
    ("excess_loss", {"learning_rate": 0.1, "floor": 0.2}),
]
NAMES = ("group_softmax", "exp3", "group_dro", "excess_loss")


class Definition:
    """Shares of the sources that have come, as a paper writes them; one that comes gets an equal share."""

    def __init__(self, name: str, settings: Given, *, num_examples: int = N) -> None:
        self.name = name
        self.settings = {key: float(value) for key, value in settings.items()}
        self.size = num_examples
        self.share: dict[int, float] = {}
        self.value: dict[int, float] = {}
        self.rows: dict[int, int] = {}
        self.sums: dict[int, float] = {}
        self.steps = 0

    def step(self, told: Statistics) -> None:
        assert told.losses is not None
        ids = list(range(self.size)) if told.ids is None else told.ids.tolist()
        counts = [1] * len(ids) if told.counts is None else told.counts.tolist()
        losses = dict(zip(ids, told.losses.astype(np.float64).tolist(), strict=True))
        if told.reference_losses is not None:
            for source, reference in zip(ids, told.reference_losses.tolist(), strict=True):
                losses[source] = float(np.float32(np.float32(losses[source]) - np.float32(reference)))
        before, new = len(self.share), [source for source in ids if source not in self.share]
        if not ids:
            return
        after = before + len(new)
        self.share = {source: share * before / after for source, share in self.share.items()}
        self.share |= dict.fromkeys(new, 1 / after)
        for source, count in zip(ids, counts, strict=True):
            self.rows[source] = self.rows.get(source, 0) + count
        self.steps += 1
        getattr(self, self.name)(losses, set(new))
        for source in range(self.size):
            weight = self.share.get(source, 1 / after) * after
            self.sums[source] = self.sums.get(source, 0.0) + weight

    def normalised(self, grown: dict[int, float], smoothing: float) -> None:
        total = math.fsum(grown.values())
        self.share = {one: (1 - smoothing) * each / total + smoothing / len(grown) for one, each in grown.items()}

    def group_softmax(self, losses: dict[int, float], new: set[int]) -> None:
        keep, temperature = self.settings["loss_decay"], self.settings["temperature"]
        for source, loss in losses.items():
            self.value[source] = loss if source in new else keep * self.value[source] + (1 - keep) * loss
        top = max(self.value.values())
        grown = {source: math.exp((value - top) / temperature) for source, value in self.value.items()}
        self.normalised(grown, self.settings["floor"])

    def exp3(self, losses: dict[int, float], new: set[int]) -> None:
        """Online Data Mixing: the end of iteration t and the start of t + 1."""
        count, keep = len(self.share), self.settings["reward_decay"]

        def rate(t: int) -> float:
            return min(1 / count, math.sqrt(math.log(count) / (count * t)))

        for source, loss in losses.items():
            self.value[source] = keep * self.value.get(source, 0.0) + (1 - keep) * loss / self.share[source]
        inverse = rate(self.steps) / self.settings["temperature"]
        top = max(self.value.values())
        grown = {source: math.exp(inverse * (value - top)) for source, value in self.value.items()}
        self.normalised(grown, max(count * rate(self.steps + 1), self.settings["floor"]))

    def group_dro(self, losses: dict[int, float], new: set[int]) -> None:
        grown = dict(self.share)
        for source, loss in losses.items():
            self.value[source] = loss + self.settings["adjustment"] / math.sqrt(self.rows[source])
            grown[source] *= math.exp(self.settings["learning_rate"] * self.value[source])
        self.normalised(grown, self.settings["floor"])

    def excess_loss(self, losses: dict[int, float], new: set[int]) -> None:
        for source, excess in losses.items():
            self.value[source] = max(0.0, excess)
        rate = self.settings["learning_rate"]
        grown = {source: share * math.exp(rate * self.value[source]) for source, share in self.share.items()}
        self.normalised(grown, self.settings["floor"])

    def weights(self) -> Floats:
        count = max(len(self.share), 1)
        return count * np.array([self.share.get(source, 1 / count) for source in range(self.size)])

    def scores(self) -> Floats:
        if self.name == "excess_loss":
            return np.array([self.sums[one] / self.steps if one in self.share else np.nan for one in range(self.size)])
        return np.array([self.value.get(one, np.nan) for one in range(self.size)])


def begun(name: str, given: Given, num_examples: int = N) -> tuple[Rule, TableState]:
    rule = build(name, given)
    return rule, rule.init(num_examples, device=torch.device("cpu"))


def a_step(
    rule: Rule, losses: Mapping[int, float] | Floats, references: float = 0.0, counts: list[int] | None = None
) -> Statistics:
    """A step with the losses of these sources."""
    told = losses if isinstance(losses, Mapping) else dict(enumerate(losses.tolist()))
    values = np.array(list(told.values()), np.float32)
    with_reference = "reference_losses" in rule.signals
    return Statistics(
        ids=np.array(list(told), np.int64),
        losses=values,
        reference_losses=np.full_like(values, references) if with_reference else None,
        counts=None if counts is None else np.array(counts),
    )


def drawn(rule: Rule, random: np.random.Generator, rows: int | None, num_examples: int = N) -> Statistics:
    """Some sources have high losses, some low ones, some negative."""
    ids = None if rows is None else random.choice(num_examples, rows, replace=False).astype(np.int64)
    lean = np.linspace(-0.5, 3.0, num_examples)[slice(None) if ids is None else ids]
    losses = (lean + random.normal(size=len(lean))).astype(np.float32)
    references = random.normal(1.0, size=len(lean)).astype(np.float32) if "reference_losses" in rule.signals else None
    counts = random.integers(1, 9, len(lean))
    return Statistics(ids=ids, losses=losses, reference_losses=references, counts=counts)


def same(left: TableState, right: TableState) -> bool:
    sums = [(s.scored, s.raw_sum, s.raw_square_sum, s.scalars) for s in (left, right)]
    return sums[0] == sums[1] and all(left.columns[name].equal(right.columns[name]) for name in left.columns)


def copied(state: TableState) -> TableState:
    columns = {name: column.clone() for name, column in state.columns.items()}
    return replace(state, columns=columns, scalars=dict(state.scalars))


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(("name", "given"), CASES)
def test_it_is_its_paper_s_algorithm(name: str, given: dict[str, float], at_once: bool) -> None:
    """With all sources in the first step there is nothing beside the box; else they come one after the other."""
    rule, state = begun(name, given)
    definition = Definition(name, rule.settings)
    random = np.random.default_rng(1)
    for turn in range(60):
        rows = None if turn in (0, 40) and at_once else int(random.integers(1, 5))
        step = drawn(rule, random, rows)
        state = rule.update(state, step)
        definition.step(step)
        expected = definition.weights()
        np.testing.assert_allclose(rule.weights(state, None), expected, rtol=1e-5, atol=1e-6)
        assert abs(float(rule.weights(state, None).astype(np.float64).mean()) - 1.0) < 1e-6
        np.testing.assert_allclose(rule.scores(state, None), definition.scores(), rtol=2e-5, atol=1e-5)
        assert rule.effective_examples(state) == pytest.approx(expected.sum() ** 2 / (expected**2).sum(), rel=1e-5)
    assert state.scored == N
    assert np.ptp(expected) > 0.1 or given.get("floor") == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_the_hopeless_have_the_floor_and_no_less(name: str) -> None:
    rule, state = begun(name, {"floor": 0.25} | ({"learning_rate": 1.0} if name == "group_dro" else {}))
    for _ in range(500):
        state = rule.update(state, a_step(rule, np.linspace(0.0, 1000.0, N)))
    weights = rule.weights(state, None)
    assert weights.min() == pytest.approx(0.25)
    assert weights.argmax() == N - 1
    assert rule.above_floor(state, np.array([0, N - 1])).tolist() == [False, True]


@pytest.mark.parametrize("name", NAMES)
def test_what_has_the_higher_loss_weighs_more(name: str) -> None:
    rule, state = begun(name, {}, num_examples=4)
    for _ in range(30):
        state = rule.update(state, a_step(rule, np.array([0.5, 1.0, 2.0, 2.5])))
    assert (np.diff(rule.weights(state, None)) > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_equal_losses_leave_all_uniform(name: str) -> None:
    rule, state = begun(name, {})
    for _ in range(50):
        state = rule.update(state, a_step(rule, np.full(N, 2.0)))
    np.testing.assert_allclose(rule.weights(state, None), np.ones(N), rtol=1e-6)


def test_an_absent_source_keeps_its_loss_under_group_softmax() -> None:
    rule, state = begun("group_softmax", {}, num_examples=3)
    state = rule.update(state, a_step(rule, np.array([1.0, 2.0, 3.0])))
    before, score = rule.weights(state, None), rule.scores(state, None)[2]
    for _ in range(50):
        state = rule.update(state, a_step(rule, {0: 0.1, 1: 2.0}))
    after = rule.weights(state, None)
    assert rule.scores(state, None)[2] == score
    assert (after[2] - 0.05) / (after[1] - 0.05) == pytest.approx((before[2] - 0.05) / (before[1] - 0.05), rel=1e-5)


def test_an_absent_source_falls_behind_under_group_dro_and_others_absent_with_it() -> None:
    rule, state = begun("group_dro", {"floor": 1e-4}, num_examples=4)
    state = rule.update(state, a_step(rule, np.array([1.0, 2.0, 3.0, 4.0])))
    before = rule.weights(state, None)
    for _ in range(20):
        state = rule.update(state, a_step(rule, {0: 2.0, 1: 2.0}))
    after = rule.weights(state, None)
    assert after[2] < before[2]
    assert after[3] / after[2] == pytest.approx(before[3] / before[2], rel=1e-3)
    assert after[1] / after[0] == pytest.approx(before[1] / before[0], rel=1e-3)


def test_an_absent_source_counts_with_its_latest_excess_loss() -> None:
    """It is the same whether a source reports an excess loss again, or not at all."""
    rule, silent = begun("excess_loss", {"learning_rate": 0.1}, num_examples=3)
    telling = copied(silent)
    silent = rule.update(silent, a_step(rule, np.array([0.0, 0.5, 1.0])))
    telling = rule.update(telling, a_step(rule, np.array([0.0, 0.5, 1.0])))
    for _ in range(10):
        silent = rule.update(silent, a_step(rule, {0: 0.1}))
        telling = rule.update(telling, a_step(rule, np.array([0.1, 0.5, 1.0])))
    assert same(silent, telling)


def test_the_bandit_is_uniform_until_every_source_may_have_been_drawn() -> None:
    rule, state = begun("exp3", {})
    exploring = math.floor(N * math.log(N))
    for turn in range(1, exploring + 20):
        state = rule.update(state, a_step(rule, np.linspace(0.5, 5.0, N)))
        uniform = np.ptp(rule.weights(state, None)) < 1e-6
        assert uniform == (turn + 1 <= N * math.log(N)), turn


def test_the_bandit_makes_up_for_a_source_that_is_seldom_drawn() -> None:
    """Drawn by their shares, sources have estimates in proportion to their losses."""
    rule, state = begun("exp3", {"reward_decay": 0.98, "temperature": 0.3}, num_examples=4)
    random, losses = np.random.default_rng(5), np.array([1.0, 2.0, 3.0, 4.0])
    found = []
    for turn in range(1500):
        shares = rule.weights(state, None).astype(np.float64) / 4
        source = int(random.choice(4, p=shares / shares.sum()))
        state = rule.update(state, a_step(rule, {source: losses[source]}))
        if turn >= 750:
            found.append(np.nan_to_num(rule.scores(state, None)))
    # A visit keeps 0.98 of an estimate and adds a 50th of loss/share: without the division all would be losses.
    mean = np.mean(found, axis=0)
    assert (np.diff(mean) > 0).all()
    assert mean[3] > 4.0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("loss", [1e3, 1e30])
def test_a_source_that_is_huge_once_has_all_but_the_floors_and_gives_it_back(name: str, loss: float) -> None:
    rule, state = begun(name, {"floor": 0.1})
    usual = np.linspace(1.0, 2.0, N)
    for _ in range(50):
        state = rule.update(state, a_step(rule, usual))
    state = rule.update(state, a_step(rule, {3: loss}))
    weights = rule.weights(state, None)
    assert np.isfinite(weights).all()
    assert weights.argmax() == 3
    assert np.delete(weights, 3).min() >= 0.1 - 1e-6
    if loss == 1e30:
        np.testing.assert_allclose(np.delete(weights, 3), weights.min(), rtol=1e-6)
    back = None
    for turn in range(1000):
        state = rule.update(state, a_step(rule, {**dict(enumerate(usual.tolist())), 3: 0.5}))
        if rule.weights(state, None)[3] < 1.0:
            back = turn
            break
    assert back is not None


@pytest.mark.parametrize("name", NAMES)
def test_a_new_source_enters_with_an_equal_share(name: str) -> None:
    """It had weight 1 before; in the step in which it comes, its loss moves it as it moves others."""
    rule, state = begun(name, {"floor": 0.01}, num_examples=4)
    for _ in range(40):
        state = rule.update(state, a_step(rule, {0: 1.0, 1: 2.0, 2: 3.0}))
    before = rule.weights(state, None)
    assert before[3] == 1.0
    assert before[:3].mean() == pytest.approx(1.0, rel=1e-6)
    neutral = {"group_softmax": 2.0, "group_dro": 0.0, "excess_loss": 0.0, "exp3": 2.0}[name]
    others = {0: 0.0, 1: 0.0, 2: 0.0} if name == "excess_loss" else {}
    after = rule.weights(rule.update(state, a_step(rule, {**others, 3: neutral})), None)
    if name in ("group_dro", "excess_loss"):
        assert after[3] == pytest.approx(1.0, rel=1e-5)
    else:
        assert before.min() < after[3] < before.max() or name == "exp3"
    assert (np.diff(after[:3]) > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_source_alone_has_weight_one(name: str) -> None:
    rule, state = begun(name, {}, num_examples=1)
    for loss in (1.0, 5.0, 0.0, -3.0):
        state = rule.update(state, a_step(rule, {0: loss}))
        assert rule.weights(state, None).tolist() == [1.0]


class World:
    """Sources of which a model learns as much as it is given: loss = irreducible + reducible·exp(-given)."""

    def __init__(self) -> None:
        self.irreducible = np.array([0.0, 0.0, 3.0])
        """The last one is noise."""
        self.reducible = np.array([1.0, 4.0, 0.1])
        self.given = np.zeros(3)

    @property
    def losses(self) -> Floats:
        return self.irreducible + self.reducible * np.exp(-self.given)

    def trained(self, name: str, settings: Given, steps: int = 300) -> Floats:
        """Mean weights over a run in which examples are drawn by weight."""
        rule, state = begun(name, settings, num_examples=3)
        total = np.zeros(3)
        for _ in range(steps):
            losses = self.losses.astype(np.float32)
            references = self.irreducible.astype(np.float32) if "reference_losses" in rule.signals else None
            step = Statistics(ids=np.arange(3), losses=losses, reference_losses=references)
            state = rule.update(state, step)
            weights = rule.weights(state, None).astype(np.float64)
            self.given += 0.02 * weights
            total += weights
        return total / steps


def test_a_reference_tells_noise_from_what_can_be_learned() -> None:
    by_loss, by_excess = World(), World()
    fooled = by_loss.trained("group_softmax", {})
    shown = by_excess.trained("excess_loss", {"learning_rate": 0.05})
    assert fooled.argmax() == 2
    assert shown.argmax() == 1
    assert shown[2] < 0.7 < fooled[2]
    assert by_excess.losses[1] < 0.5 * by_loss.losses[1]


def test_group_dro_brings_the_worst_group_down() -> None:
    robust, even = World(), World()
    for world in (robust, even):
        world.irreducible[2], world.reducible[2] = 0.0, 0.5
    robust.trained("group_dro", {"learning_rate": 0.1})
    even.trained("group_dro", {"floor": 1.0})
    assert robust.losses.max() < 0.5 * even.losses.max()


def test_a_small_group_is_raised_by_its_adjustment() -> None:
    rule, state = begun("group_dro", {"adjustment": 5.0, "learning_rate": 0.1}, num_examples=2)
    for _ in range(10):
        state = rule.update(state, a_step(rule, {0: 1.0, 1: 1.0}, counts=[1, 100]))
    small, large = rule.weights(state, None)
    assert small > large
    assert state.columns["rows"].tolist() == [10, 1000]


def test_rows_are_counted_as_far_as_int32_goes() -> None:
    rule, state = begun("group_dro", {"adjustment": 1.0}, num_examples=2)
    for _ in range(3):
        state = rule.update(state, a_step(rule, {0: 1.0}, counts=[2**30]))
    assert state.columns["rows"].tolist() == [2**31 - 1, 0]


def test_losses_that_are_maxima_by_token_are_taken_as_they_are() -> None:
    """The paper's excess loss: the mean over tokens of max(0, loss - reference loss), sent with references of 0."""
    random = np.random.default_rng(3)
    tokens = random.normal(size=(2, 50))
    excess = np.maximum(tokens, 0.0).mean(axis=1)
    rule, state = begun("excess_loss", {}, num_examples=2)
    weights = rule.weights(rule.update(state, a_step(rule, excess)), None)
    grown = np.exp(excess)
    np.testing.assert_allclose(weights, 2 * ((1 - 1e-3) * grown / grown.sum() + 1e-3 / 2), rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_request_count_as_their_mean(name: str) -> None:
    rule, state = begun(name, {})
    references = np.zeros(3, np.float32) if "reference_losses" in rule.signals else None
    losses = np.array([1.0, 2.0, 4.0], np.float32)
    told = aggregate(np.array([5, 2, 5]), losses=losses, reference_losses=references)
    assert same(rule.update(copied(state), told), rule.update(state, a_step(rule, {2: 2.0, 5: 2.5}, counts=[1, 2])))


@pytest.mark.parametrize(("name", "given"), CASES)
@pytest.mark.parametrize("masked", [False, True])
def test_the_log_replays_to_the_last_bit(name: str, given: dict[str, float], masked: bool) -> None:
    """The page is written at step 20: replay then leaves out what it holds."""
    rule, live = begun(name, given)
    random = np.random.default_rng(9)
    log, kept = [], copied(live)
    for turn in range(60):
        step = drawn(rule, random, int(random.integers(0, 6)))
        scalars = rule.prepare(live, step)
        live = rule.apply(live, step, scalars)
        pages = np.array([turn >= 20]) if masked else None
        log.append(LoggedStatistics(statistics=step, scalars=scalars, pages=pages))
        if masked and turn == 19:
            kept = copied(live)
    stored = begun(name, given)[1]
    stored.columns = kept.columns
    stored.scored, stored.raw_sum, stored.raw_square_sum = kept.scored, kept.raw_sum, kept.raw_square_sum
    replayed = rule.replay(stored, log)
    assert same(replayed, live)
    assert same(rule.restore(copied(replayed)), live)


def _spoiled(name: str) -> list[tuple[str, int, Any]]:
    statistic = {"exp3": "reward", "excess_loss": "excess"}.get(name, "loss")
    spoiled: list[tuple[str, int, Any]] = [("raw", 3, -2), ("raw", 3, (2048 << 30) + 1), (statistic, 1, math.nan)]
    if name == "group_dro":
        spoiled += [("rows", 2, -1), ("rows", 2, 0)]
    if name == "excess_loss":
        spoiled += [("excess", 2, -0.5), ("mean_weight", 2, math.inf), ("mean_weight", 2, -1.0)]
    return spoiled


@pytest.mark.parametrize("name", NAMES)
def test_tables_that_the_rule_never_writes_are_refused(name: str) -> None:
    rule, state = begun(name, {})
    state = rule.update(state, a_step(rule, np.linspace(0.0, 1.0, N)))
    rule.restore(copied(state))
    for column, row, value in _spoiled(name):
        bad = copied(state)
        bad.columns[column][row] = value
        with pytest.raises(RuleError, match=rf"state.{column}\[{row}\] = {value}.*rule {name} never writes that"):
            rule.restore(bad)


def test_a_replay_takes_the_exploration_rate_from_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logarithms differ between machines."""
    rule, live = begun("exp3", {})
    stored, log = copied(live), []
    for _ in range(40):
        step = a_step(rule, np.linspace(0.0, 5.0, N))
        log.append(LoggedStatistics(statistics=step, scalars=rule.prepare(live, step)))
        live = rule.apply(live, step, log[-1].scalars)
    monkeypatch.setattr("equipoise_server.rules.exp3.exploration_rate", lambda *_: 0.01)
    assert same(rule.replay(stored, log), live)


@pytest.mark.parametrize("scalar", ["rate", "next_rate"])
@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
def test_exploration_rates_that_the_rule_never_writes_are_refused(scalar: str, value: float) -> None:
    rule, state = begun("exp3", {})
    state = rule.update(state, a_step(rule, np.linspace(0.0, 1.0, N)))
    state.scalars[scalar] = value
    with pytest.raises(RuleError, match=f"{scalar} = {value}: rule exp3 needs"):
        rule.restore(state)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("scalar", "value"),
    [
        ("sources", 0.0),
        ("sources", 1.5),
        ("time", -1.0),
        ("time", math.nan),
        ("shift", math.inf),
        ("mean", 0.0),
        ("mean", math.nan),
    ],
)
def test_scalars_that_the_rule_never_writes_are_refused(name: str, scalar: str, value: float) -> None:
    rule, state = begun(name, {})
    step = a_step(rule, np.linspace(0.0, 1.0, N))
    state = rule.update(state, step)
    kept = copied(state)
    with pytest.raises(RuleError, match=f"{scalar} = .*rule {name} needs"):
        rule.apply(state, step, {**state.scalars, scalar: value})
    assert same(state, kept)
    state.scalars[scalar] = value
    with pytest.raises(RuleError, match=f"{scalar} = .*rule {name} needs"):
        rule.restore(state)
