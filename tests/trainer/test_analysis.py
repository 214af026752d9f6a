import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from equipoise_trainer.analysis import chosen_index, detection_auroc, effective_examples, first_reaching, similarity


def test_auroc_is_scikit_learns_with_ties() -> None:
    rng = np.random.default_rng(0)
    scores, flipped = rng.integers(0, 8, 300).astype(float), rng.random(300) < 0.3
    assert detection_auroc(scores, flipped) == pytest.approx(roc_auc_score(flipped, -scores), rel=1e-12)


def test_a_low_score_is_suspicious_and_an_unscored_example_is_not() -> None:
    flipped = np.array([True, True, False, False])
    assert detection_auroc(np.array([-2.0, -1.0, 1.0, np.nan]), flipped) == 1.0
    assert detection_auroc(np.array([np.nan, np.nan, -1.0, -2.0]), flipped) == 0.0


@pytest.mark.parametrize("flipped", [np.zeros(3, bool), np.ones(3, bool)])
def test_auroc_needs_both_kinds(flipped: np.ndarray) -> None:
    assert np.isnan(detection_auroc(np.arange(3.0), flipped))


def test_runs_are_read_off_at_the_first_lowest_guard_loss() -> None:
    assert chosen_index(np.array([3.0, 1.0, 2.0, 1.0])) == 1
    assert chosen_index(np.array([np.nan, 2.0, np.inf, 1.5])) == 3


def test_first_reaching() -> None:
    steps, losses = np.array([0, 5, 10]), np.array([2.0, 1.0, 1.5])
    assert first_reaching(steps, losses, 1.0) == 5
    assert first_reaching(steps, losses, 0.5) is None


def test_effective_examples_lie_between_one_and_all() -> None:
    assert effective_examples(np.ones(7)) == pytest.approx(7)
    assert effective_examples(np.array([0.0, 5.0, 0.0])) == pytest.approx(1)


def test_sim_is_the_papers_formula_over_examples_above_the_floor() -> None:
    rng = np.random.default_rng(1)
    c, weights = rng.normal(1, 2, 50), rng.uniform(0.5, 1.5, 50)
    gamma = weights / weights.sum()
    expected = (gamma @ c) / np.sqrt(((c - gamma @ c) ** 2).sum() / 49)
    assert similarity(c, weights) == pytest.approx(expected, rel=1e-12)
    floored = np.append(weights, 0.001)
    assert similarity(np.append(c, 1e6), floored) == pytest.approx(expected, rel=1e-12)
    assert np.isnan(similarity(np.ones(4), np.ones(4)))
