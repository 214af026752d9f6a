"""The search: it lowers the area, can be interrupted anywhere, and measures what the paper defines."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from equipoise_trainer.datasets import DatasetConfig, load
from equipoise_trainer.offline.adjoint import StoppedError, pull_back
from equipoise_trainer.offline.logistic import LogisticProblem
from equipoise_trainer.offline.measures import Measures, looked_steps, measure
from equipoise_trainer.offline.path import RunPath
from equipoise_trainer.offline.planted import COPIES, Planted, plant
from equipoise_trainer.offline.rows import LocalRows
from equipoise_trainer.offline.search import AdjointSims, SearchPlan, spread_epochs
from tests.trainer.offline.searches import EPOCHS, ROWS, SETTINGS, SIZE, small_search, small_task


def test_the_area_falls_and_flipped_examples_lose_their_weight() -> None:
    measures, path = small_search().run()
    assert [each.epoch for each in measures] == [0, 2, EPOCHS]
    areas = [each.area for each in measures]
    assert areas[0] > areas[1] > areas[2]
    first, last = measures[0], measures[-1]
    assert np.nanmean(last.sim) > 1.5 * np.nanmean(first.sim)
    assert last.zero_flipped.mean() > 2 * last.zero_clean.mean() > 0
    assert len(measures[1].test_loss) == 0
    np.testing.assert_allclose(last.target_loss[-1], path.problem.mean_losses([path.last], "target")[0])


def test_a_warm_up_scales_what_is_sent() -> None:
    plan = SearchPlan(measured=range(EPOCHS + 1), tested=(), looks=2)
    warm = replace(plan, warm_up=3)
    assert [warm.scale(epoch) for epoch in range(4)] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert [plan.scale(epoch) for epoch in range(2)] == [1, 1]
    searches = small_search(), small_search(), small_search(holder=LocalRows(replace(SETTINGS, learning_rate=1e-4)))
    for search, followed in zip(searches, (plan, warm, plan), strict=True):
        search.plan = followed
    at_once, grown, third = ([each.area for each in search.run()[0]] for search in searches)
    # Its first policy epoch is that of a third of ε₀, its second is not.
    assert grown[1] == pytest.approx(third[1], rel=1e-7)
    assert at_once[1] < grown[1]
    assert grown[2] < third[2] - 1e-4
    with pytest.raises(ValueError, match="warm_up: -1, must be at least 0"):
        replace(plan, warm_up=-1)


@pytest.mark.parametrize("rows_before", [1, 17, ROWS - 1, ROWS + 5])
def test_a_search_that_was_interrupted_anywhere_ends_the_same(tmp_path: Path, rows_before: int) -> None:
    undisturbed = small_search()
    expected, _ = undisturbed.run()
    asked = iter(range(1, 10_000))
    interrupted = small_search(tmp_path, stop=lambda: next(asked) >= rows_before)
    with pytest.raises(StoppedError):
        interrupted.run()
    holder = interrupted.holder
    assert isinstance(holder, LocalRows)
    assert holder.moves() in (rows_before, rows_before + 1)  # it is not asked after the last row of an epoch
    found, _ = small_search(tmp_path, holder).run()  # another process, with the same holder
    np.testing.assert_array_equal(holder.fetch(0, ROWS), undisturbed.holder.fetch(0, ROWS))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.target_loss, other.target_loss)
        np.testing.assert_array_equal(one.sim, other.sim)
        np.testing.assert_array_equal(one.adjoint_sim, other.adjoint_sim)
        assert np.isfinite(one.adjoint_sim).all()


def test_measures_are_those_of_the_definitions() -> None:
    task = small_task()
    problem = LogisticProblem(task, learning_rate=0.3, dtype=np.float64)
    rng = np.random.default_rng(1)
    weights = (rng.exponential(size=(ROWS, SIZE)) * (rng.random((ROWS, SIZE)) > 0.3)).astype(np.float32)
    path = RunPath.run(problem, weights)
    found = measure(path, epoch=7, planted=Planted.of_flips(task.flipped), looks=ROWS)
    sims = AdjointSims(weights, looked_steps(ROWS, count=ROWS))
    for step, contributions in pull_back(path):
        sims.add(step, contributions)

    def features(name: str) -> np.ndarray:
        examples = dict(task.splits())[name]
        return examples.features * (2 * examples.labels[:, None] - 1)

    theta = np.zeros(128)
    for step in range(ROWS):
        train, target, test = features("train"), features("target"), features("test")
        assert found.target_loss[step] == pytest.approx(np.log1p(np.exp(-target @ theta)).mean())
        assert found.test_loss[step] == pytest.approx(np.log1p(np.exp(-test @ theta)).mean())
        gradients = -train / (1 + np.exp(train @ theta))[:, None]
        aim = -(target / (1 + np.exp(target @ theta))[:, None]).mean(axis=0)
        contributions, gamma = gradients @ aim, weights[step] / weights[step].sum(dtype=np.float64)
        used, mean = gamma > 0, gamma @ contributions
        deviation = np.sqrt(((contributions[used] - mean) ** 2).sum() / (used.sum() - 1))
        assert found.sim[step] == pytest.approx(mean / deviation)
        assert found.effective[step] == pytest.approx(1 / (gamma**2).sum())
        assert found.zero[step] == pytest.approx((~used).mean())
        assert found.zero_nonpositive[step] == pytest.approx((~used)[contributions <= 0].mean())
        assert found.zero_flipped[step] == pytest.approx((~used)[task.flipped].mean())
        gradient = weights[step].astype(np.float64) @ gradients / SIZE
        assert found.gradient_norms[step] == pytest.approx(np.linalg.norm(gradient))
        theta = theta - 0.3 * gradient
    # At the last step λ_T is ∇L_A(θ_T).
    aim = -(target / (1 + np.exp(target @ theta))[:, None]).mean(axis=0)
    contributions = gradients @ aim
    mean = gamma @ contributions
    deviation = np.sqrt(((contributions[used] - mean) ** 2).sum() / (used.sum() - 1))
    assert sims.values()[-1] == pytest.approx(mean / deviation)


def test_measures_come_back_from_their_file(tmp_path: Path) -> None:
    measures, _ = small_search(tmp_path).run()
    again = Measures.load(tmp_path / "epoch-0004.npz")
    assert again.epoch == EPOCHS
    for name in Measures.__slots__:
        np.testing.assert_array_equal(getattr(again, name), getattr(measures[-1], name))


def test_planted_examples_are_what_they_are_called() -> None:
    task = load(DatasetConfig(name="paper", seed=1, flipped=0.1))
    changed, planted = plant(task, seed=1)
    assert planted.groups.shape[1] == COPIES
    for group in planted.groups:
        assert (changed.train.features[group] == changed.train.features[group[0]]).all()
        assert len(set(changed.train.labels[group])) == 1
    assert not (planted.easy & planted.flipped).any()
    assert not planted.flipped[planted.groups].any()
    path = RunPath.run(LogisticProblem(changed, learning_rate=0.1), np.ones((60, 4096), dtype=np.float32))
    losses = path.replay(range(60)).look(59).losses
    assert (losses[planted.easy] < 1e-6).mean() > 0.9
    assert (losses[planted.plain] < 1e-6).mean() < 0.01
    untouched = planted.plain | planted.flipped
    np.testing.assert_array_equal(changed.train.features[untouched], task.train.features[untouched])


def test_the_epochs_and_steps_that_are_measured_are_spread() -> None:
    assert spread_epochs(80, count=5) == [0, 1, 5, 20, 45, 80]
    assert spread_epochs(1, count=9) == [0, 1]
    np.testing.assert_array_equal(looked_steps(5, count=100), np.arange(5))
    assert looked_steps(1000, count=10)[[0, -1]].tolist() == [0, 999]
