import numpy as np
import pytest
from sklearn.datasets import load_digits

from equipoise_trainer.datasets import DATASETS, DatasetConfig, load
from equipoise_trainer.tasks import Task, flip_labels

SIZES = {
    "digits": (1000, 200, 100, 497),
    "paper": (4096, 512, 512, 20_000),
    "paper-noisy": (4096, 512, 512, 20_000),
}


@pytest.mark.parametrize("name", DATASETS)
def test_sets_have_their_sizes_and_share_no_example(name: str) -> None:
    task = load(DatasetConfig(name=name, seed=3))
    sets = [examples for _, examples in task.splits()]
    assert tuple(len(examples) for examples in sets) == SIZES[name]
    rows = np.concatenate([examples.features for examples in sets])
    assert len(np.unique(rows, axis=0)) == len(rows)
    assert not task.flipped.any()


def test_digits_are_the_whole_of_the_real_data() -> None:
    task = load(DatasetConfig(name="digits", seed=0))
    pixels, labels = load_digits(return_X_y=True)
    together = np.concatenate([np.column_stack([each.features, each.labels]) for _, each in task.splits()])
    original = np.column_stack([pixels / 16, np.ones(len(pixels)), labels])
    np.testing.assert_array_equal(together[np.lexsort(together.T)], original[np.lexsort(original.T)])


@pytest.mark.parametrize("name", DATASETS)
def test_equal_configurations_give_equal_tasks_and_seeds_differ(name: str) -> None:
    def everything(task: Task) -> list[np.ndarray]:
        arrays = [array for _, each in task.splits() for array in (each.features, each.labels)]
        return [*arrays, task.flipped]

    first, again, other = (load(DatasetConfig(name=name, seed=seed, flipped=0.2)) for seed in (1, 1, 2))
    for one, two in zip(everything(first), everything(again), strict=True):
        np.testing.assert_array_equal(one, two)
    assert not np.array_equal(first.train.features, other.train.features)


@pytest.mark.parametrize("name", DATASETS)
def test_flips_change_exactly_their_share_of_train_labels_and_nothing_else(name: str) -> None:
    clean, noisy = (load(DatasetConfig(name=name, seed=4, flipped=share)) for share in (0.0, 0.2))
    assert noisy.flipped.sum() == round(0.2 * len(noisy.train))
    np.testing.assert_array_equal(noisy.train.labels != clean.train.labels, noisy.flipped)
    for (_, one), (_, two) in zip(clean.splits(), noisy.splits(), strict=True):
        np.testing.assert_array_equal(one.features, two.features)
    for one, two in ((clean.target, noisy.target), (clean.guard, noisy.guard), (clean.test, noisy.test)):
        np.testing.assert_array_equal(one.labels, two.labels)


def test_flipped_labels_spread_over_all_other_classes() -> None:
    labels = np.zeros(20_000, np.int64)
    noisy, flipped = flip_labels(labels, classes=5, share=0.5, generator=np.random.default_rng(0))
    counts = np.bincount(noisy[flipped], minlength=5)
    assert counts[0] == 0
    np.testing.assert_allclose(counts[1:], 2500, rtol=0.1)
    assert not labels.any()


def test_paper_has_the_paper_distributions() -> None:
    task = load(DatasetConfig(name="paper", seed=0))
    assert task.features == 128
    assert task.train.features.mean() == pytest.approx(0, abs=0.02)
    assert task.train.features.var() == pytest.approx(3, rel=0.02)
    assert task.test.features.mean() == pytest.approx(0.5, abs=0.01)
    assert task.test.features.var() == pytest.approx(1, rel=0.02)


def test_paper_labels_follow_one_linear_teacher_and_noise_is_larger_on_train() -> None:
    clean, noisy = (load(DatasetConfig(name=name, seed=0)) for name in ("paper", "paper-noisy"))
    everything = np.concatenate([each.features for _, each in clean.splits()])
    signs = 2.0 * np.concatenate([each.labels for _, each in clean.splits()]) - 1
    teacher, *_ = np.linalg.lstsq(everything, signs, rcond=None)
    assert np.mean(np.sign(everything @ teacher) == signs) > 0.97
    wrong = {name: np.mean((each.features @ teacher > 0) != each.labels) for name, each in noisy.splits()}
    # A margin of deviation √3 with noise 1 changes sides in arctan(1/√3)/π = 1/6 of the cases.
    assert wrong["train"] == pytest.approx(1 / 6, abs=0.03)
    assert wrong["test"] < 0.08


def test_another_target_size_leaves_the_other_sets_alone() -> None:
    small, large = (load(DatasetConfig(name="paper", seed=0, target_size=size)) for size in (512, 4096))
    assert (len(small.target), len(large.target)) == (512, 4096)
    for (name, one), (_, two) in zip(small.splits(), large.splits(), strict=True):
        if name != "target":
            np.testing.assert_array_equal(one.features, two.features)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "mnist"}, r"dataset: 'mnist', must be one of digits, paper, paper-noisy"),
        ({"flipped": 1.0}, r"flipped: 1.0, must be at least 0 and below 1"),
        ({"seed": -1}, r"seed: -1, must be at least 0"),
        ({"target_size": 201}, r"target_size: 201, must be at most 200 for digits"),
        ({"target_size": 0}, r"target_size: 0, must be at least 1"),
    ],
)
def test_errors_name_field_value_and_rule(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DatasetConfig(**({"name": "digits", "seed": 0} | changes))  # type: ignore[arg-type]
