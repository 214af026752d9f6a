"""Rule `strata` against its definition, written out once more, and what it promises beside it."""

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from equipoise_server.engine.codec import LoggedStep, decode, encode
from equipoise_server.engine.step import Kind, Step
from equipoise_server.rules import Rule, RuleError, Statistics, TableState, aggregate, build, evidence
from equipoise_server.rules.merits import Decision, Merits

N, S, G = 120, 4, 3
SETTINGS: dict[str, float | bool] = {
    "strata": S,
    "groups": G,
    "window": 64.0,
    "memory": 40.0,
    "min_count": 8.0,
    "min_target_losses": 10.0,
    "target_memory": 40.0,
    "loss_decay": 0.6,
    "rms_decay": 0.9,
    "floor": 0.1,
    "soft": False,
}


class Definition:
    """The rule as the page of rules writes it: dictionaries and loops, an example and a stratum at a time."""

    def __init__(self, settings: Mapping[str, float], *, num_examples: int = N) -> None:
        self.set = settings
        self.num_examples = num_examples
        self.loss: dict[int, float] = {}
        self.stratum: dict[int, int] = {}
        self.points: dict[int, tuple[list[float], float]] = {}
        self.mean_square = 0.0
        cells = int(settings["strata"]) * int(settings["groups"])
        self.sums = [[0.0, 0.0, 0.0] for _ in range(cells)]
        self.merit = [1.0] * cells
        self.target = [0.0] * cells

    def step(self, told: Statistics) -> None:
        assert told.ids is not None
        ids = told.ids.tolist()
        if told.losses is not None:
            groups = [0] * len(ids) if told.groups is None else told.groups.tolist()
            for example, loss in zip(ids, told.losses.tolist(), strict=True):
                kept = self.set["loss_decay"]
                smoothed = self.loss[example] * kept + loss * (1 - kept) if example in self.loss else loss
                self.loss[example] = float(np.float32(smoothed))
            self._compare(told, groups)
            for group in set(groups):
                self._merge(self.points, group, [self.loss[e] for e, g in zip(ids, groups, strict=True) if g == group])
            for example, group in zip(ids, groups, strict=True):
                self.stratum[example] = group * int(self.set["strata"]) + self._quantile(
                    self.points, group, self.loss[example]
                )
        if told.contributions is not None:
            pairs = [(e, c) for e, c in zip(ids, told.contributions.tolist(), strict=True) if not math.isnan(c)]
            if pairs:
                self._contribute(pairs)

    def _compare(self, told: Statistics, groups: list[int]) -> None:
        """Where losses of the target lie among the training examples' losses of the step, as these were reported."""
        if told.losses is None or told.target_losses is None:
            return
        size, memory = int(self.set["strata"]), self.set["target_memory"]
        of = [None] * len(told.target_losses) if told.target_groups is None else told.target_groups.tolist()
        for group in set(groups):
            own = [loss for loss, one in zip(told.losses.tolist(), groups, strict=True) if one == group]
            target = [t for t, one in zip(told.target_losses.tolist(), of, strict=True) if one in (None, group)]
            for cell in range(group * size, (group + 1) * size):
                self.target[cell] *= memory / (memory + len(target))
            for loss in target:
                begin = sum(other < loss for other in own) / (len(own) + 1)
                end = (sum(other <= loss for other in own) + 1) / (len(own) + 1)
                for k in range(size):
                    inside = min(end, (k + 1) / size) - max(begin, k / size)
                    self.target[group * size + k] += max(inside, 0.0) / (end - begin)

    def ratios(self) -> list[float]:
        size, found = int(self.set["strata"]), []
        for cell in range(len(self.merit)):
            group = range(cell // size * size, (cell // size + 1) * size)
            total = sum(self.target[k] for k in group)
            near = {k: 1.0 if k == cell else self.set["smoothing"] for k in (cell - 1, cell, cell + 1) if k in group}
            mean = sum(weight * self.target[k] for k, weight in near.items()) / sum(near.values())
            found.append(1.0 if total < self.set["min_target_losses"] else min(mean * size / total, 1.0))
        return found

    @property
    def raw(self) -> list[float]:
        floor = self.set["floor"]
        power = self.set["sharpness"]
        return [max(merit * ratio**power, floor) for merit, ratio in zip(self.merit, self.ratios(), strict=True)]

    def scores(self) -> list[float]:
        power = self.set["sharpness"]
        return [z + power * math.log(max(ratio, 1e-3)) for z, ratio in zip(self.z(), self.ratios(), strict=True)]

    def weights(self) -> NDArray[np.float64]:
        raw = self.raw
        mean = sum(raw[cell] for cell in self.stratum.values()) / max(len(self.stratum), 1)
        return np.array([raw[self.stratum[e]] / mean if e in self.stratum else 1.0 for e in range(self.num_examples)])

    def z(self) -> list[float]:
        return [self._z(cell) if self._has_enough(cell) else 0.0 for cell in range(len(self.merit))]

    def _has_enough(self, cell: int) -> bool:
        of_group, least = int(self.set["strata"]), self.set["min_count"]
        first = cell // of_group * of_group
        counts = [self.sums[k][0] for k in range(first, first + of_group)]
        mean = sum(n * n for n in counts) / sum(counts) if sum(counts) else 0.0  # over contributions
        return mean >= least and self.sums[cell][0] >= max(0.2 * least, 1.0)

    def _z(self, cell: int) -> float:
        of_group = int(self.set["strata"])
        weights = {cell: 1.0}
        for neighbour in (cell - 1, cell + 1):
            if 0 <= neighbour < len(self.merit) and neighbour // of_group == cell // of_group:
                weights[neighbour] = self.set["smoothing"]
        count, total, square = (sum(w * self.sums[k][i] for k, w in weights.items()) for i in range(3))
        effective = count**2 / sum(w * w * self.sums[k][0] for k, w in weights.items())
        mean = total / count
        return mean / math.sqrt(max(square / count - mean**2, 1e-9) / effective)

    def _merge(self, kept: dict[int, tuple[list[float], float]], group: int, new: list[float]) -> None:
        size = 4 * int(self.set["strata"])
        points, mass = kept.get(group, ([], 0.0))
        mass *= self.set["window"] / (self.set["window"] + len(new))
        line = sorted([(p, mass / size) for p in points] + [(value, 1.0) for value in new], key=lambda each: each[0])
        middles, below = [], 0.0
        for _, weight in line:
            middles.append(below + weight / 2)
            below += weight
        merged = []
        for index in range(size):
            wanted = (index + 0.5) / size * below
            right = min(max(bisect_left(middles, wanted), 1), len(line) - 1) if len(line) > 1 else 0
            left = max(right - 1, 0)
            (low, high), span = (line[left][0], line[right][0]), middles[right] - middles[left]
            share = min(max((wanted - middles[left]) / span, 0.0), 1.0) if span else 0.0
            merged.append(low + share * (high - low))
        kept[group] = merged, mass + len(new)

    def _quantile(self, kept: dict[int, tuple[list[float], float]], group: int, loss: float) -> int:
        points, _ = kept[group]
        return sum((points[4 * k - 1] + points[4 * k]) / 2 < loss for k in range(1, int(self.set["strata"])))

    def _contribute(self, pairs: list[tuple[int, float]]) -> None:
        reach = 30 * math.sqrt(self.mean_square) if self.mean_square else math.inf
        square = sum(min(abs(c), reach) ** 2 for _, c in pairs) / len(pairs)
        decay = self.set["rms_decay"]
        self.mean_square = decay * self.mean_square + (1 - decay) * square if self.mean_square else square
        scale = math.sqrt(self.mean_square)
        for cell in range(len(self.merit)):
            new = [min(max(c / scale, -3.0), 3.0) for e, c in pairs if self.stratum.get(e) == cell]
            kept = self.set["memory"] / (self.set["memory"] + len(new))
            old = [kept * value for value in self.sums[cell]]
            self.sums[cell] = [old[0] + len(new), old[1] + sum(new), old[2] + sum(c * c for c in new)]
        for cell, z in enumerate(self.z()):
            if not self._has_enough(cell):
                continue
            lower, upper, floor = self.set["lower_below"], self.set["raise_above"], self.set["floor"]
            if self.set["soft"]:
                slope = 2.0 / max(upper - lower, 1e-3)
                self.merit[cell] = floor + (1 - floor) / (
                    1 + math.exp(min(max(slope * ((lower + upper) / 2 - z), -30), 30))
                )
            elif z < lower:
                self.merit[cell] = floor
            elif z > upper:
                self.merit[cell] = 1.0


def made(**settings: float | bool) -> Rule:
    return build("strata", {**SETTINGS, **settings})


def start(rule: Rule, num_examples: int = N) -> TableState:
    return rule.init(num_examples, device=torch.device("cpu"))


def told(rng: np.random.Generator, *, rows: int = 24, kind: str = "both") -> Statistics:
    """A step in which high losses of a group have low contributions; the group is the id's rest."""
    ids = rng.choice(N, rows, replace=False).astype(np.int64)
    hard = rng.gamma(2.0, 1.0, N)[ids] * 0.2 + (ids % 7) * 0.5
    contributions = (1.0 - hard + rng.normal(size=rows)).astype(np.float32)
    if kind == "sparse":
        contributions[rng.random(rows) < 0.6] = np.nan
    target = rng.gamma(2.0, 0.5, 10).astype(np.float32)
    return Statistics(
        ids=ids,
        losses=None if kind == "contributions" else hard.astype(np.float32),
        contributions=None if kind in ("losses", "target", "whole") else contributions,
        groups=None if kind == "contributions" else ids % G,
        target_losses=target if kind in ("target", "whole") else None,
        target_groups=rng.integers(0, G, 10) if kind == "target" else None,
    )


KINDS = ("both", "sparse", "losses", "contributions", "both")


def history(seed: int, steps: int = 60, kinds: tuple[str, ...] = KINDS) -> list[Statistics]:
    rng = np.random.default_rng(seed)
    return [told(rng, kind=kinds[index % len(kinds)]) for index in range(steps)]


@pytest.mark.parametrize(
    "settings", [{}, {"soft": True}, {"smoothing": 0.0}, {"floor": 0.001, "raise_above": -1.6, "smoothing": 1.0}]
)
@pytest.mark.parametrize("kinds", [KINDS, ("target", *KINDS, "whole"), ("whole", *KINDS)])
def test_it_is_its_definition(settings: dict[str, float | bool], kinds: tuple[str, ...]) -> None:
    rule = made(**settings)
    state, definition = start(rule), Definition({name: float(value) for name, value in rule.settings.items()})
    lowered = 0
    for step in history(1, kinds=kinds):
        definition.step(step)
        state = rule.update(state, step)
        seen = np.array(sorted(definition.stratum))
        np.testing.assert_array_equal(rule.read_kept(state, "stratum", seen), [definition.stratum[e] for e in seen])
        np.testing.assert_allclose(rule.read_kept(state, "loss", seen), [definition.loss[e] for e in seen], rtol=1e-6)
        np.testing.assert_allclose(rule.weights(state, None), definition.weights(), rtol=1e-6)
        scores = np.array(definition.scores())[[definition.stratum[e] for e in seen]]
        np.testing.assert_allclose(rule.scores(state, seen), scores, rtol=1e-5, atol=1e-6)
        lowered += int((definition.weights() < 0.9).sum())
    assert lowered > 100, "the weights must have acted"
    weights = definition.weights()
    assert rule.effective_examples(state) == pytest.approx(weights.sum() ** 2 / (weights**2).sum(), rel=1e-7)


@pytest.mark.parametrize("spike", [1e4, -1e30])
def test_one_enormous_contribution_is_the_definition_s_and_silences_no_other(spike: float) -> None:
    rule = made(floor=0.02)
    definition = Definition({name: float(value) for name, value in rule.settings.items()})
    state, rng = start(rule), np.random.default_rng(14)
    for index in range(300):
        step = told(rng)
        if index == 60:
            assert step.contributions is not None
            step.contributions[3] = spike
        definition.step(step)
        state = rule.update(state, step)
        np.testing.assert_allclose(rule.weights(state, None), definition.weights(), rtol=1e-6)
        if index >= 50:
            assert rule.effective_ratio(state) < 0.9


def test_contributions_that_grow_beyond_all_measure_are_followed() -> None:
    rule = made()
    states = [start(rule), start(rule)]
    for state, factor in zip(states, (1.0, 1e-25), strict=True):
        rng = np.random.default_rng(15)
        for index in range(300):
            step = told(rng)
            if index < 50:
                assert step.contributions is not None
                step = replace(step, contributions=step.contributions * np.float32(factor))
            rule.update(state, step)
    one, other = (math.sqrt(state.scalars["mean_square"]) for state in states)
    assert one == pytest.approx(other, rel=0.01)
    np.testing.assert_allclose(*(rule.weights(state, None) for state in states), atol=0.1)


def test_the_contrast_has_the_same_bits_on_every_machine() -> None:
    """Of sums, products and quotients alone, each correctly rounded, one after another."""
    rng = np.random.default_rng(16)
    for _ in range(100):
        count, square = rng.uniform(20, 40, 5), rng.uniform(20, 40, 5)
        merits = Merits(of_group=5, count=count, total=rng.normal(size=5) * 9, square=square, weight=np.ones(5))
        means, errors = merits.means.tolist(), merits.errors.tolist()
        precision = [1.0 / (error * error) for error in errors]
        middle = sum(p * m for p, m in zip(precision, means, strict=True)) / sum(precision)
        squares = sum(p * ((m - middle) * (m - middle)) for p, m in zip(precision, means, strict=True))
        decision = Decision(min_count=2.0, lower_below=-1.0, raise_above=1.0, soft=True, floor=0.1, smoothing=0.5)
        assert merits.contrast(decision) == squares / 4


def test_weights_have_mean_one_over_all_examples() -> None:
    rule = made()
    state = start(rule)
    for step in history(2):
        state = rule.update(state, step)
        assert rule.weights(state, None).astype(np.float64).mean() == pytest.approx(1.0, abs=1e-6)
        assert state.sizes.sum() == state.scored == (rule.read_kept(state, "stratum", None) >= 0).sum()


def test_weights_are_uniform_until_there_is_evidence() -> None:
    rule = made(min_count=40.0)
    state, rng = start(rule), np.random.default_rng(3)
    for _ in range(8):  # 192 contributions, 16 a stratum
        state = rule.update(state, told(rng))
        assert (rule.weights(state, None) == 1.0).all()


def test_noise_alone_hardly_moves_the_weights() -> None:
    rule = build("strata", {})
    state, rng = start(rule), np.random.default_rng(4)
    effective = []
    for _ in range(400):
        values = rng.normal(size=(2, 32)).astype(np.float32)
        ids = rng.choice(N, 32, replace=False).astype(np.int64)
        state = rule.update(state, Statistics(ids=ids, losses=np.exp(values[0]), contributions=values[1]))
        effective.append(rule.effective_ratio(state))
    assert np.mean(effective) > 0.95


def test_harmful_strata_get_the_floor_whatever_the_sign_of_loss() -> None:
    """High losses are bad here, low ones there: contributions decide."""
    for sign in (1.0, -1.0):
        rule = build("strata", {"strata": 8.0})
        state, rng = start(rule), np.random.default_rng(5)
        for _ in range(120):
            ids = rng.choice(N, 32, replace=False).astype(np.int64)
            bad = ids < N // 4
            losses = (3.0 + sign * bad + 0.3 * rng.normal(size=32)).astype(np.float32)
            contributions = (0.3 - 0.9 * bad + rng.normal(size=32)).astype(np.float32)
            state = rule.update(state, Statistics(ids=ids, losses=losses, contributions=contributions))
        weights = rule.weights(state, None)
        assert weights[: N // 4].mean() < 0.15 < 1.15 < weights[N // 4 :].mean()
        assert np.isfinite(rule.scores(state, None)).all()


def test_losses_of_two_values_have_weights_too() -> None:
    """Most strata are empty then."""
    rule = build("strata", {})
    state, rng = start(rule), np.random.default_rng(17)
    for _ in range(200):
        ids = rng.choice(N, 32, replace=False).astype(np.int64)
        losses = (ids < N // 3).astype(np.float32)
        contributions = (0.5 - losses + rng.normal(size=32)).astype(np.float32)
        state = rule.update(state, Statistics(ids=ids, losses=losses, contributions=contributions))
    weights = rule.weights(state, None)
    assert weights[: N // 3].max() < 0.3 < 1.2 < weights[N // 3 :].min()


def test_quantiles_follow_losses_that_fall() -> None:
    rule = build("strata", {"strata": 8.0, "window": 128.0})
    state, rng = start(rule, 4000), np.random.default_rng(6)
    shares = np.zeros(8)
    for index in range(300):
        ids = rng.choice(4000, 32, replace=False).astype(np.int64)
        losses = (np.exp(rng.normal(size=32)) * 0.98**index).astype(np.float32)
        state = rule.update(state, Statistics(ids=ids, losses=losses))
        if index > 20:
            shares += np.bincount(rule.read_kept(state, "stratum", ids).astype(int), minlength=8)
    shares /= shares.sum()
    assert shares.min() > 0.4 / 8  # of losses seen once most are in the window: the quantiles lag a little
    assert shares.max() < 2.0 / 8


def test_order_within_a_step_does_not_matter() -> None:
    rule, rng = made(), np.random.default_rng(7)
    states = [start(rule), start(rule)]
    for step in history(8):
        assert step.ids is not None
        order = rng.permutation(len(step.ids))
        parts = {name: getattr(step, name) for name in ("losses", "contributions", "groups")}
        mixed = {name: None if values is None else values[order] for name, values in parts.items()}
        states = [rule.update(states[0], step), rule.update(states[1], Statistics(ids=step.ids[order], **mixed))]
        for read in (rule.weights, rule.scores):
            np.testing.assert_allclose(read(states[0], None), read(states[1], None), rtol=1e-6)


def test_a_restored_state_goes_on_alike_to_the_last_bit() -> None:
    rule, steps = made(), history(9)
    state = start(rule)
    for step in steps[:30]:
        state = rule.update(state, step)
    copy = start(rule)
    for name, column in state.columns.items():
        copy.columns[name].copy_(column)
    copy.scalars = dict(state.scalars)
    copy = rule.restore(copy)
    for step in steps[30:]:
        state, copy = rule.update(state, step), rule.update(copy, step)
    assert copy.scalars == state.scalars
    assert copy.scored == state.scored
    np.testing.assert_array_equal(copy.sizes, state.sizes)
    for name, column in state.columns.items():
        assert column.equal(copy.columns[name])


@pytest.mark.parametrize("behind", [0, 17, 44])
def test_a_log_replays_to_the_same_bits_also_over_tables_that_are_ahead(behind: int) -> None:
    """What the log keeps is enough, wherever the pages stood; the tables have one page, of version `behind`."""
    rule = made()
    state, stored, entries = start(rule), start(rule), []
    for version, step in enumerate(history(10)):
        if version == behind:
            for name, column in state.columns.items():
                stored.columns[name].copy_(column)
        scalars = rule.prepare(state, step)
        logged = LoggedStep(step=Step(kind=Kind.STEP, statistics=step), scalars=scalars, evidence=None, at=0.0)
        entries.append(decode(encode(logged)))
        assert entries[-1].scalars == scalars
        state = rule.apply(state, step, scalars)
    stored = rule.restore(stored)
    for version, entry in enumerate(entries):
        assert entry.step.statistics is not None
        stored = rule.apply(stored, entry.step.statistics, entry.scalars, pages=np.array([version >= behind]))
    assert stored.scalars == state.scalars
    np.testing.assert_array_equal(stored.sizes, state.sizes)
    for name, column in state.columns.items():
        assert column.equal(stored.columns[name])


def test_unmeasured_contributions_show_no_evidence_of_their_own() -> None:
    rule, rng = made(), np.random.default_rng(11)
    step = told(rng, kind="sparse")
    assert step.contributions is not None
    state = start(rule)
    shown = evidence(rule, state, step, rule.prepare(state, step))
    there = step.contributions[~np.isnan(step.contributions)].astype(np.float64)
    assert shown is not None
    assert shown.positive_share == (there > 0).mean()
    assert shown.sim == pytest.approx(there.mean() / there.std(ddof=1))
    nothing = replace(step, contributions=np.full_like(step.contributions, np.nan))
    assert evidence(rule, state, nothing, rule.prepare(state, nothing)).sim is None  # type: ignore[union-attr]


def test_contributions_of_examples_without_a_stratum_say_nothing() -> None:
    rule = made()
    step = Statistics(ids=np.arange(5), contributions=np.full(5, -1, np.float32))
    state = rule.update(start(rule), step)
    assert state.scored == 0
    assert all(state.scalars[f"count.{cell}"] == 0.0 for cell in range(S * G))
    assert np.isnan(rule.scores(state, None)).all()


def test_repeated_rows_average_what_was_measured() -> None:
    step = aggregate(
        np.array([4, 2, 4, 4]),
        np.array([1.0, 5.0, 9.0, 3.0], np.float32),
        np.array([1.0, 2.0, 3.0, 5.0], np.float32),
        groups=np.array([1, 0, 1, 1]),
        measured=np.array([True, False, False, True]),
    )
    assert step.ids is not None
    assert step.ids.tolist() == [2, 4]
    np.testing.assert_array_equal(step.contributions, np.array([np.nan, 2.0], np.float32))
    np.testing.assert_array_equal(step.losses, np.array([2.0, 3.0], np.float32))
    np.testing.assert_array_equal(step.groups, [0, 1])


def test_an_example_has_one_group() -> None:
    with pytest.raises(RuleError, match=r"groups\[2\] = 1, but example 4 has a row of group 0|groups\[0\]") as caught:
        aggregate(np.array([4, 2, 4]), losses=np.ones(3, np.float32), groups=np.array([0, 0, 1]))
    assert caught.value.field.startswith("groups[")


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Statistics(ids=np.arange(2), losses=np.ones(2, np.float32)), "groups is absent: rule strata with 3 groups"),
        (
            Statistics(ids=np.arange(2), losses=np.ones(2, np.float32), groups=np.array([0, 3])),
            r"groups = 3 of example 1: rule strata has groups \[0, 3\)",
        ),
        (Statistics(ids=np.arange(2), reference_losses=np.ones(2, np.float32)), "losses is absent: rule strata"),
    ],
)
def test_what_it_cannot_use_is_refused(step: Statistics, message: str) -> None:
    with pytest.raises(RuleError, match=message):
        made().check(step)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strata": 64, "groups": 17}, "rule.settings.groups = 17: rule strata needs at most 1024 strata, and has 64"),
        (
            {"lower_below": -1, "raise_above": -2},
            "rule.settings.raise_above = -2: rule strata needs at least lower_below",
        ),
        ({"memory": 20}, "rule.settings.memory = 20: rule strata needs at least min_count, 150"),
        ({"strata": 2.5}, "whole"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(RuleError, match=message):
        build("strata", settings)


def test_a_state_that_it_never_writes_is_refused() -> None:
    rule = made()
    for name, value in (("stratum", S * G), ("stratum", -2), ("loss", math.inf)):
        state = start(rule)
        state.columns[name][7] = value
        with pytest.raises(RuleError, match=rf"state.{name}\[7\]"):
            rule.restore(state)
    for name, value in (("weight.0", 0.01), ("count.3", -1.0), ("point.1", math.nan), ("point.17", -99.0)):
        state = rule.update(start(rule), told(np.random.default_rng(12)))
        state.scalars[name] = value
        with pytest.raises(RuleError, match=name):
            rule.restore(state)
    state = rule.update(start(rule), told(np.random.default_rng(12)))
    del state.scalars["sum.2"]
    with pytest.raises(RuleError, match=r"sum\.2"):
        rule.restore(state)


def test_the_report_says_how_the_strata_stand() -> None:
    rule = made()
    state = start(rule)
    for step in history(13):
        state = rule.update(state, step)
    report = rule.strata(state)
    assert report is not None
    assert [(each.group, each.stratum) for each in report.strata] == [(g, s) for g in range(G) for s in range(S)]
    assert sum(each.examples for each in report.strata) == state.scored
    weights, strata = rule.weights(state, None), rule.read_kept(state, "stratum", None)
    for cell, each in enumerate(report.strata):
        assert (each.above_loss is None) == (each.stratum == 0)
        assert (weights[strata == cell] == np.float32(each.weight)).all()
    assert report.contrast is not None
    assert report.contrast > 1.0
