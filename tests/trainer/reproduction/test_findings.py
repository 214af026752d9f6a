"""Numbers of finished runs against their definitions, on curves made by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest

from equipoise_trainer.offline.measures import BINS, Measures
from equipoise_trainer.offline.planted import Planted
from equipoise_trainer.reproduction.claims import perceptron_claims
from equipoise_trainer.reproduction.findings import find, low_share, median, online_cost, search_cost, spearman
from equipoise_trainer.reproduction.runs import Curves, FinishedRun

SIZE, STEPS = 10, 100


def measures(epoch: int, *, rate: float, sim: float, zero: float = 0.0) -> Measures:
    """A run whose loss is 1/(1 + rate·t) on target, and a tenth above that on test."""
    losses = 1 / (1 + rate * np.arange(STEPS + 1))
    looked = np.array([0, 50, 99])
    flat = np.ones(3)
    learned = np.zeros(BINS)
    learned[[2, 40]] = 3, 1
    return Measures(
        epoch=epoch,
        target_loss=losses,
        test_loss=1.1 * losses,
        gradient_norms=np.ones(STEPS),
        looked=looked,
        sim=sim * flat,
        adjoint_sim=2 * sim * flat,
        effective=5 * flat,
        zero=zero * flat,
        zero_nonpositive=np.array([zero, np.nan, zero]),
        zero_positive=zero * flat,
        zero_flipped=3 * zero * flat,
        zero_clean=zero * flat,
        learned=learned,
        unlearned=np.ones(BINS),
        easy_weight=0.5 * flat,
        plain_weight=flat,
        group_weight=6 * flat,
        group_zero=zero * flat,
        mean_weight=np.arange(SIZE, dtype=np.float64),
    )


def run(*, rate: float = 0.4, final_sim: float = 0.9) -> FinishedRun:
    flipped = np.zeros(SIZE, dtype=np.bool_)
    flipped[[0, 2]] = True
    slow = 1 / (1 + 0.2 * np.arange(STEPS + 1))
    matched = Curves(
        steps=np.arange(STEPS + 1.0),
        target_loss=slow,
        test_loss=np.full(STEPS + 1, 2.0),
        seconds=1.0,
        effective=math.nan,
    )
    return FinishedRun(
        study={"name": "paper-4096", "target_size": 5, "policy_epochs": 3},
        seed=0,
        rows="in process",
        epoch_seconds=(0.5,),
        measures=(
            measures(0, rate=0.1, sim=0.3),
            measures(1, rate=0.05, sim=0.2),
            measures(3, rate=rate, sim=final_sim, zero=0.2),
        ),
        matched=matched,
        online=None,
        planted=Planted.of_flips(flipped),
    )


def test_findings_are_what_the_curves_say() -> None:
    found = find(run(), reference_nats=math.log(2))
    # 1/(1 + 0.4·t) is as low as 1/(1 + 0.1·100) at t = 25.
    assert found.accelerations == (pytest.approx(4), pytest.approx(4))
    assert found.matched == (pytest.approx(2), None)
    area = np.mean([1 / (1 + 0.1 * step) for step in range(1, STEPS + 1)])
    assert found.areas == (pytest.approx(area), pytest.approx(1.1 * area))
    assert found.compression[0] == pytest.approx(math.log(2) / area)
    assert found.area_rises == 1
    slowest = np.mean([1 / (1 + 0.05 * step) for step in range(1, STEPS + 1)])
    assert found.largest_rise == pytest.approx(slowest / area - 1)
    assert found.sim_ratio == pytest.approx(3)
    assert found.spearman == pytest.approx(1)
    assert found.effective_share == (pytest.approx(0.5), pytest.approx(0.5))
    assert found.zero_nonpositive == pytest.approx(0.2)
    assert found.learned_low == pytest.approx(0.75)
    assert found.unlearned_low == pytest.approx(0.2)
    assert found.group_weight == pytest.approx(6)
    # Of the 16 pairs of a flipped and a clean example only (2, 1) is in the wrong order.
    assert found.auroc == pytest.approx(15 / 16)


def test_costs_are_counted_in_products_with_features() -> None:
    assert online_cost(run()) == pytest.approx((3 * 10 + 2 * 5) / 20)
    assert search_cost(run()) == pytest.approx(3 * (5 * 10 + 2 * 5) / 20)


def test_a_run_that_never_got_there_counts_as_the_slowest() -> None:
    assert median([None, 2.0, 3.0]) == 2.0
    assert median([None, None, 3.0]) is None
    assert low_share(np.zeros(BINS)) != low_share(np.zeros(BINS))  # NaN
    assert spearman(np.array([1.0, 5.0, 9.0]), np.array([0.3, 0.2, 0.1])) == pytest.approx(-1)


def test_verdicts_follow_the_numbers_and_what_was_not_run_says_so() -> None:
    good = find(run(), reference_nats=math.log(2))
    claims = {claim.what.split(":")[0]: claim.verdict for claim in perceptron_claims({"paper-4096": [good]})}
    assert claims["The Learning Law"] == "yes"
    (area,) = (claim for claim in perceptron_claims({"paper-4096": [good]}) if "lowers the area" in claim.what)
    assert area.verdict == "partly"  # its second measured epoch is worse than its first
    assert f"rises: 1, of up to {100 * good.largest_rise:.1f} %" in area.ours
    steady = replace(good, area_rises=0, largest_rise=0.0)
    (area,) = (claim for claim in perceptron_claims({"paper-4096": [steady]}) if "lowers the area" in claim.what)
    assert (area.verdict, area.ours.split("(")[1]) == ("yes", "never rose)")
    weak = find(run(final_sim=0.5), reference_nats=math.log(2))
    claims = {claim.what.split(":")[0]: claim.verdict for claim in perceptron_claims({"paper-4096": [good, weak]})}
    assert claims["The Learning Law"] == "partly"
    assert claims["Wrong labels are found"] == "not run"
    fast = find(run(rate=0.8), reference_nats=math.log(2))
    by_name = {claim.what: claim for claim in perceptron_claims({"paper-4096": [fast], "noisy-512": [good]})}
    verdicts = [claim.verdict for claim in by_name.values() if "acceleration" in claim.what]
    assert verdicts == ["not run", "yes", "no", "not run"]
    beaten = replace(fast, matched=(9.0, 9.0))
    verdicts = [claim.verdict for claim in perceptron_claims({"paper-4096": [beaten]}) if "acceleration" in claim.what]
    assert verdicts == ["not run", "partly", "not run", "not run"]
