import numpy as np

from equipoise_trainer.lm.batches import ShuffledBatches


def test_every_epoch_holds_every_sequence_once_in_a_new_order() -> None:
    batches = ShuffledBatches(10, batch_size=4, seed=3)
    drawn = np.concatenate([batches.at(step) for step in range(5)])
    np.testing.assert_array_equal(np.sort(drawn[:10]), np.arange(10))
    np.testing.assert_array_equal(np.sort(drawn[10:]), np.arange(10))
    assert not np.array_equal(drawn[:10], drawn[10:])


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    first, again = (ShuffledBatches(10, batch_size=4, seed=3) for _ in range(2))
    for step in (7, 0, 3):
        np.testing.assert_array_equal(first.at(step), again.at(step))
    assert not np.array_equal(first.at(0), ShuffledBatches(10, batch_size=4, seed=4).at(0))


def test_a_batch_may_be_larger_than_the_set() -> None:
    counts = np.bincount(ShuffledBatches(3, batch_size=8, seed=0).at(0))
    assert counts.sum() == 8
    assert counts.min() >= 2
