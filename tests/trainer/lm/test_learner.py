import numpy as np
import pytest
import torch

from equipoise_trainer.lm.costs import Meter
from equipoise_trainer.lm.learner import Learner, LearnerConfig
from equipoise_trainer.lm.model import sequence_losses
from equipoise_trainer.lm.steps import KEPT, MIXED, PlainSteps, Surroundings, TrimmedSteps
from equipoise_trainer.perturbation import PADDING
from tests.trainer.lm.sizes import TINY, tiny_task

CONFIG = LearnerConfig(preset=TINY, seed=0, learning_rate=1e-2)


def around() -> Surroundings:
    return Surroundings(task=tiny_task(), learner=Learner(CONFIG), meter=Meter(), batch_size=8, seed=0)


def gradients(learner: Learner) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in learner.model.parameters() if p.grad is not None])


def test_losses_start_at_the_uniform_guess_and_padding_counts_for_nothing() -> None:
    learner, rows = Learner(CONFIG), tiny_task().test[:16].copy()
    assert learner.measure(rows) == pytest.approx(np.log(TINY.vocabulary), abs=0.05)
    rows[:, 5:] = PADDING
    short = sequence_losses(learner.model, torch.from_numpy(rows[:, :5].copy()))
    torch.testing.assert_close(sequence_losses(learner.model, torch.from_numpy(rows)), short)


def test_a_move_has_the_length_it_is_given_and_the_direction_adamw_gives_it() -> None:
    ours, theirs = Learner(CONFIG), Learner(CONFIG)
    before = torch.cat([p.detach().flatten().clone() for p in ours.model.parameters()])
    for learner, length in ((ours, None), (theirs, 0.125)):
        learner.losses(tiny_task().train[:8]).mean().backward()
        norm = learner.step(0, length=length)
        moved = torch.cat([p.detach().flatten() for p in learner.model.parameters()]) - before
        assert norm == pytest.approx(float(moved.norm()), rel=1e-4)
        assert length is None or norm == length
    first, second = (
        torch.cat([p.detach().flatten() for p in learner.model.parameters()]) - before for learner in (ours, theirs)
    )
    assert float(torch.nn.functional.cosine_similarity(first, second, dim=0)) == pytest.approx(1.0, abs=1e-5)


def test_plain_steps_are_the_mean_loss_of_their_sequences() -> None:
    place = around()
    made = PlainSteps(place).make(3)
    found = gradients(place.learner)
    place.learner.optimizer.zero_grad()
    place.learner.losses(place.task.train[made.ids]).mean().backward()
    torch.testing.assert_close(found, gradients(place.learner))
    assert place.meter.units(8) == 1


def test_the_oracle_sees_the_clean_source_alone_and_the_mixture_some_of_the_target() -> None:
    place = around()
    for step in range(50):
        assert (place.task.sources[PlainSteps(place, data="oracle").make(step).ids] == 0).all()
    assert len(PlainSteps(place, data="mixture").make(0).ids) == 8 - round(8 * MIXED)
    assert len(PlainSteps(place, data="target").make(0).ids) == 0


def test_trimming_keeps_the_lowest_losses_and_pays_for_all() -> None:
    place = around()
    made = TrimmedSteps(place).make(0)
    losses = place.learner.each(place.task.train[made.ids])
    kept = made.weights > 0
    assert kept.sum() == round(KEPT * 8)
    assert losses[kept].max() <= losses[~kept].min()
    assert made.weights.mean() == 1
    assert place.meter.units(8) == 1
    found = gradients(place.learner)
    place.learner.optimizer.zero_grad()
    place.learner.losses(place.task.train[made.ids[kept]]).mean().backward()
    torch.testing.assert_close(found, gradients(place.learner), atol=1e-6, rtol=1e-4)
