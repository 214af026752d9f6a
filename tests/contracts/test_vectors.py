"""The golden vectors: current, and what the rules' definitions give in float64, worked out from the JSON alone."""

import math
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from equipoise.conformance.vectors import Case, floats, load
from equipoise_server.rules import Statistics, names
from tests.server.rules.test_batch import softmax_mean_one
from tests.server.rules.test_guard import guard_by_hand
from tests.server.rules.test_learnability import Definition as LearnabilityDefinition
from tests.server.rules.test_reference import Definition
from tests.server.rules.test_sources import NAMES as SOURCE_RULES
from tests.server.rules.test_sources import Definition as SourcesDefinition
from tests.server.rules.test_strata import Definition as StrataDefinition
from tests.server.rules.test_trajectory import sorted_projection

FOLDER = Path(__file__).parents[2] / "proto" / "vectors"
CASES = list(load(FOLDER))

Floats = NDArray[np.float64]
Request = Mapping[str, Any]


def test_the_vectors_are_those_of_the_rules() -> None:
    checked = subprocess.run(
        [sys.executable, FOLDER.parent / "generate_vectors.py", "--check"], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_rule_has_vectors() -> None:
    assert sorted({case.rule for case in CASES}) == names()
    assert sorted(path.stem for path in FOLDER.glob("*.json")) == names()


def test_the_guard_turns_to_uniform_and_back() -> None:
    for case in CASES:
        if case.name.endswith("/guard") and case.rule != "uniform":
            all_one = [set(step["response"]["weights"]) == {1.0} for step in case.steps]
            assert (all_one[0], any(all_one), all_one[-1]) == (False, True, False), case.name


class ByHand(ABC):
    """A case, answered from the definitions."""

    keeps_weights = True

    def __init__(self, case: Case) -> None:
        self.settings = dict(case.facts["resolved_settings"])
        self.size: int = case.facts["policy"]["num_examples"]
        self.guard_losses: list[float] = []
        self.strength = 0.0
        self.evidence: dict[str, float] = {}

    def consume(self, request: Request) -> None:
        """A step that is applied."""
        rows = _aggregated(request, self.size)
        if rows is not None:
            served, above = self.weights(request), self.above_floor(request)
            self.learn(rows, request)
            if not self.keeps_weights:
                served = self.weights(request)  # as the step gets them
            assert rows.ids is not None
            self.evidence = _evidence(rows.contributions, served[rows.ids], above[rows.ids])
        if "guard_loss" in request and self.settings["guard"]:
            self.guard_losses.append(request["guard_loss"])
            self.strength = guard_by_hand(self.guard_losses, self.settings["guard_stretch"])[0][-1]

    @abstractmethod
    def learn(self, rows: Statistics, request: Request) -> None:
        """Takes a step's statistics."""

    @abstractmethod
    def plain(self, request: Request | None) -> Floats:
        """Weights of all examples before the guard; as a read of all gives them, or as a request is answered."""

    def weights(self, request: Request | None = None) -> Floats:
        return (1 - self.strength) * self.plain(request) + self.strength

    def scores(self) -> Floats:
        return np.full(self.size, np.nan)

    def above_floor(self, request: Request) -> NDArray[np.bool_]:
        return np.ones(self.size, bool)


class Table(ByHand):
    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.definition = Definition(case.rule, self.settings, num_examples=self.size)

    def learn(self, rows: Statistics, request: Request) -> None:
        self.definition.step(rows)
        away = np.abs(self.definition.statistic - self.settings.get("threshold", 0.0))
        assert not ((away > 0) & (away < 1e-4))[self.definition.seen].any(), "a rounding decides"

    def plain(self, request: Request | None) -> Floats:
        return self.definition.weights

    def scores(self) -> Floats:
        return np.where(self.definition.seen, self.definition.statistic, np.nan)

    def above_floor(self, request: Request) -> NDArray[np.bool_]:
        told = self.definition
        raw = told.weights if told.name == "projected_gradient" else told._raw()
        return ~told.seen | (raw > self.settings.get("floor", 0.0) + 1e-9)


class Batch(ByHand):
    keeps_weights = False

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.rule = case.rule
        self.mean_square, self.steps = 0.0, 0
        self.last = np.ones(self.size)

    def learn(self, rows: Statistics, request: Request) -> None:
        ids = np.arange(self.size) if rows.ids is None else rows.ids
        assert rows.counts is not None
        values = rows.contributions if self.rule == "boltzmann" else rows.losses
        assert values is not None
        logits = self._logits(values.astype(np.float64)) / self.settings["temperature"]
        by_row = softmax_mean_one(np.repeat(logits, rows.counts))
        self.last = np.ones(self.size)
        self.last[ids] = by_row[np.cumsum(rows.counts) - 1]

    def _logits(self, values: Floats) -> Floats:
        self.steps += 1
        if self.rule == "boltzmann":
            square, decay = float(np.mean(values**2)), self.settings["rms_decay"]
            self.mean_square = decay * self.mean_square + (1 - decay) * square if self.mean_square else square
            return values / (math.sqrt(self.mean_square) or 1.0)
        if values.min() == values.max() or self.steps <= self.settings["burn_in"]:
            return np.zeros(len(values))
        return np.minimum(2 * (values - values.min()) / (values.max() - values.min()), 1.0)

    def plain(self, request: Request | None) -> Floats:
        is_step = request is not None and (
            "losses" in request or "contributions" in request or "target_sketch" in request
        )
        return self.last if is_step else np.ones(self.size)


class Strata(ByHand):
    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.definition = StrataDefinition(self.settings, num_examples=self.size)

    def learn(self, rows: Statistics, request: Request) -> None:
        self.definition.step(rows)
        bounds = (self.settings["lower_below"], self.settings["raise_above"])
        away = all(abs(z - bound) > 1e-4 for z in self.definition.z() for bound in bounds)
        assert away or self.settings["soft"], "a rounding decides"

    def plain(self, request: Request | None) -> Floats:
        return self.definition.weights()

    def scores(self) -> Floats:
        z, strata = self.definition.scores(), self.definition.stratum
        return np.array([z[strata[one]] if one in strata else np.nan for one in range(self.size)])

    def above_floor(self, request: Request) -> NDArray[np.bool_]:
        raw, strata = self.definition.raw, self.definition.stratum
        floor = self.settings["floor"] + 1e-9
        return np.array([one not in strata or raw[strata[one]] > floor for one in range(self.size)])


class Whole(ByHand):
    """A rule whose definition gives the weights and the scores of all examples."""

    definition: SourcesDefinition | LearnabilityDefinition

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        if case.rule == "learnability":
            self.definition = LearnabilityDefinition(self.settings, num_examples=self.size)
        else:
            self.definition = SourcesDefinition(case.rule, self.settings, num_examples=self.size)

    def learn(self, rows: Statistics, request: Request) -> None:
        self.definition.step(rows)

    def plain(self, request: Request | None) -> Floats:
        return self.definition.weights()

    def scores(self) -> Floats:
        return self.definition.scores()


class Trajectory(ByHand):
    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.gamma = np.full((int(self.settings["rows"]), self.size), 1.0 / self.size)
        self.updates = np.zeros(len(self.gamma))

    def learn(self, rows: Statistics, request: Request) -> None:
        assert rows.contributions is not None
        t, epochs = request["step"], self.settings["policy_epochs"]
        share = max(0.0, 1 - self.updates[t] / epochs) if epochs else 1.0
        moved = self.gamma[t] + self.settings["learning_rate"] * share * rows.contributions.astype(np.float64)
        self.gamma[t] = sorted_projection(moved)
        self.updates[t] += 1

    def plain(self, request: Request | None) -> Floats:
        return self.size * (self.gamma.mean(axis=0) if request is None else self.gamma[request["step"]])

    def scores(self) -> Floats:
        return self.plain(None)

    def above_floor(self, request: Request) -> NDArray[np.bool_]:
        return self.gamma[request["step"]] > 0


KINDS: dict[str, type[ByHand]] = {
    "boltzmann": Batch,
    "loss_linear_upper": Batch,
    "learnability": Whole,
    "strata": Strata,
    **dict.fromkeys(SOURCE_RULES, Whole),
    "trajectory": Trajectory,
}


def _evidence(contributions: NDArray[np.float32] | None, weights: Floats, above: NDArray[np.bool_]) -> dict[str, float]:
    """What the status tells of a step: SIM (paper, section 4), share of positive contributions, largest weight."""
    found = {"largest_weight": float(weights.max())}
    if contributions is None or not (there := ~np.isnan(contributions)).any():
        return found
    contributions, weights, above = contributions[there], weights[there], above[there]
    found["positive_share"] = float((contributions > 0).mean())
    values, weights = contributions[above].astype(np.float64), weights[above]
    if len(values) > 1 and np.ptp(values) > 0 and weights.sum() > 0:
        mean = np.average(values, weights=weights)
        found["sim"] = float(mean / math.sqrt(((values - mean) ** 2).sum() / (len(values) - 1)))
    return found


def _aggregated(request: Request, num_examples: int) -> Statistics | None:
    """Ids with a scored row, in order, and the means over these rows, rounded to float32; `counts`: all rows."""
    given = {name: floats(request[name]) for name in ("contributions", "losses", "reference_losses") if name in request}
    if "target_sketch" in request:
        dtype = np.float16 if request["sketch_type"].endswith("16") else np.float32
        target = np.array(request["target_sketch"], dtype).astype(np.float64)
        sketches = np.array(request["gradient_sketches"], dtype).astype(np.float64).reshape(-1, len(target))
        given["contributions"] = (sketches @ target).astype(np.float32)
    if not given and "attempts" not in request:
        return None
    ids = np.arange(num_examples) if request.get("all_examples") else np.array(request["example_ids"])
    scored = np.array(request.get("scored", [1] * len(ids)), bool)
    found = np.unique(ids[scored])
    measured = scored & np.array(request.get("measured", [1] * len(ids)), bool)
    means = {}
    for name, values in given.items():
        rows = measured if name == "contributions" else scored
        of_each = [values[rows & (ids == one)] for one in found]
        means[name] = np.array([each.mean(dtype=np.float64) if len(each) else np.nan for each in of_each], np.float32)
    counts = np.array([(ids == one).sum() for one in found])
    groups = dict(zip(ids.tolist(), request["groups"], strict=True)) if "groups" in request else None
    of_found = None if groups is None else np.array([groups[one] for one in found.tolist()])
    outcomes = {
        name: np.array([sum(np.array(request[name])[scored & (ids == one)]) for one in found], np.int64)
        for name in ("successes", "attempts")
        if name in request
    }
    target = {"target_losses": floats(request["target_losses"])} if "target_losses" in request else {}
    target |= {"target_groups": np.array(request["target_groups"])} if "target_groups" in request else {}
    return Statistics(ids=found, counts=counts, groups=of_found, **means, **outcomes, **target)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_every_answer_follows_the_definition(case: Case) -> None:
    by_hand = KINDS.get(case.rule, Table)(case)
    tolerance = {"rtol": case.tolerance["relative"], "atol": case.tolerance["absolute"]}
    version = 0
    for step in case.steps:
        request, response = step["request"], step["response"]
        is_read = request["sequence"] == 0
        version += not is_read
        assert response["version"] == version
        if response["outcome"] == "OUTCOME_REFUSED":
            assert response["reason"] == "UNUSABLE_STATISTICS"
            continue
        assert response["outcome"] == ("OUTCOME_READ" if is_read else "OUTCOME_APPLIED")
        if not is_read:
            by_hand.consume(request)
        if request.get("omit_weights"):
            assert "weights" not in response
            continue
        everybody = range(by_hand.size) if request.get("all_examples") else []
        ids = np.array(request.get("weights_for", request.get("example_ids", everybody)), int)
        np.testing.assert_allclose(response["weights"], by_hand.weights(request)[ids], **tolerance)
    final = case.facts["final"]
    np.testing.assert_allclose(final["weights"], by_hand.weights(), **tolerance)
    np.testing.assert_allclose(floats(final["scores"]), by_hand.scores(), **tolerance)
    if isinstance(by_hand, Trajectory):
        np.testing.assert_allclose(final["rows"], by_hand.size * by_hand.gamma, **tolerance)
        assert [value == 0 for row in final["rows"] for value in row] == (by_hand.gamma == 0).ravel().tolist()
    elif isinstance(by_hand, Table):
        weights = by_hand.weights()
        effective = weights.sum() ** 2 / (weights**2).sum()
        assert final["status"]["effective_examples"] == pytest.approx(effective, rel=1e-5)
        assert final["status"]["scored_examples"] == by_hand.definition.seen.sum()
    assert final["status"]["guard_strength"] == by_hand.strength
    told = {
        name: final["status"][name] for name in ("sim", "positive_share", "largest_weight") if name in final["status"]
    }
    assert told == pytest.approx(by_hand.evidence, rel=1e-5)
    losses = [step["request"]["target_loss"] for step in case.steps if "target_loss" in step["request"]]
    nats = case.facts["policy"].get("reference_nats")
    ratio = nats / np.mean(losses) if nats and losses else None
    assert final["status"].get("compression_ratio") == (pytest.approx(ratio) if ratio else None)
