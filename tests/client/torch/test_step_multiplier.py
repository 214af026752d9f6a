"""What one example's loss is multiplied by in the gradient of a step, whatever the loop does around it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from equipoise.torch import GhostContributions, LastLayerContributions, TargetDirection
from equipoise.torch.gradients import GradientAverage
from tests.client.torch.models import class_losses
from tests.client.torch.test_norm_matched import COUNT, TARGET, backward, batch, network

EXPECTED = 1.0 / COUNT


def direction_of(model: nn.Module, **options: Any) -> TargetDirection:
    chosen = {"refresh_every": 1, "norm_matched": True, "step_noise": 2.0} | options
    return TargetDirection(model, class_losses, [batch(TARGET, 99)], **chosen)


def multiplier(direction: TargetDirection) -> float | None:
    average = direction._average
    assert average is not None
    average.expect()
    return None if average.multiplier is None else float(average.multiplier)


def train(contributions: Any, step: int) -> None:
    with contributions.capture(range(COUNT)) as capture:
        capture.losses(batch(COUNT, step)).mean().backward()


def test_gradients_that_no_optimizer_takes_do_not_count() -> None:
    """They are never cleared, and grow."""
    model = network()
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.05)
    direction = direction_of(model)
    contributions = GhostContributions(model, direction)
    for step in range(6):
        train(contributions, step)
        optimizer.step()
        optimizer.zero_grad()
    assert multiplier(direction) == pytest.approx(EXPECTED, rel=1e-9)


def test_optimizers_that_step_in_turn_each_count_their_own() -> None:
    model = network()
    optimizers = [torch.optim.SGD(model[part].parameters(), lr=0.05) for part in (0, 2)]
    direction = direction_of(model)
    contributions = GhostContributions(model, direction)
    for step in range(6):
        train(contributions, step)
        optimizers[step % 2].step()
        model.zero_grad()
    assert multiplier(direction) == pytest.approx(EXPECTED, rel=1e-9)


def test_a_second_optimizer_beside_the_preconditioner_s() -> None:
    model = network()
    adam = torch.optim.Adam(model[0].parameters(), lr=0.05)
    other = torch.optim.SGD(model[2].parameters(), lr=0.05)
    direction = direction_of(model, preconditioner=adam)
    contributions = GhostContributions(model, direction)
    for step in range(3):
        train(contributions, step)
        adam.step()
        other.step()
        model.zero_grad()
    assert multiplier(direction) == pytest.approx(EXPECTED, rel=1e-9)


@pytest.mark.parametrize("size", [300.0, 1e-5])
def test_half_precision_neither_overflows_nor_vanishes(size: float) -> None:
    model = nn.Linear(3, 1).half()
    average = GradientAverage(model, noisy=True)
    average.expect()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, size)
    average.note_backward(torch.tensor(EXPECTED))
    average.note(model.parameters())
    average.expect()
    assert float(average.multiplier) == pytest.approx(EXPECTED)


def test_a_step_within_the_block_teaches_nothing() -> None:
    """Scaled and clipped gradients cannot be told from others then: 4096/COUNT would be taken for 1/COUNT."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    direction = direction_of(model)
    contributions = GhostContributions(model, direction)
    for step in range(3):
        with contributions.capture(range(COUNT)) as capture:
            scaler.scale(capture.losses(batch(COUNT, step)).mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        assert multiplier(direction) is None
        assert direction.ready


def test_passes_of_a_survey_are_no_training() -> None:
    """A micro-batch that is skipped after its forward pass leaves what is known of the one before."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    direction = direction_of(model)
    train(GhostContributions(model, direction), 0)
    with GhostContributions(model, direction).capture(range(COUNT)) as capture:
        capture.losses(batch(COUNT, 1))
    optimizer.step()
    assert multiplier(direction) == pytest.approx(EXPECTED, rel=1e-9)


def test_a_method_that_does_not_see_noise_keeps_the_average() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    direction = direction_of(model)
    train(GhostContributions(model, direction), 0)
    optimizer.step()
    LastLayerContributions(model, direction)
    assert direction.ready
    assert direction.noise() is None


def test_captures_that_wait_do_not_keep_signs() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    direction = direction_of(model)
    contributions = GhostContributions(model, direction)
    train(contributions, 0)
    optimizer.step()
    with contributions.capture(range(COUNT)) as capture:
        backward(capture, capture.losses(batch(COUNT, 1)))
        assert capture._noise.signs
        within = capture.contributions
    assert not capture._noise.signs
    torch.testing.assert_close(capture.contributions, within)


def test_a_later_refresh_does_not_change_what_a_capture_has_looked_at() -> None:
    """As of micro-batches that are sent together."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    direction = direction_of(model, look_every=2)
    contributions = GhostContributions(model, direction)
    captures = []
    for step in range(5):
        with contributions.capture(range(COUNT)) as capture:
            capture.losses(batch(COUNT, step)).mean().backward()
        captures.append(capture)
        optimizer.step()
        optimizer.zero_grad()
    looked = [capture.plain_contributions is not None for capture in captures]
    assert looked == [False, False, True, False, True]  # at the first there was no step yet


def test_numbers_of_a_checkpoint_come_to_the_model() -> None:
    """A trainer may load them to the host, where processes cannot agree on them over NCCL."""
    average = GradientAverage(nn.Linear(2, 1, device="meta"), noisy=True)
    average.load_state_dict({}, {"mean_square": torch.tensor(1.0), "multiplier": torch.tensor(1.0)})
    for number in (average.mean_square, average.multiplier):
        assert isinstance(number, Tensor)
        assert number.device.type == "meta"


def test_a_model_on_several_devices() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = nn.ParameterList(torch.empty(3, device=f"cuda:{place}") for place in (0, 1))
        average = GradientAverage(model, noisy=True)
        target = {parameter: torch.ones_like(parameter) for parameter in model.parameters()}
        for _ in range(2):
            average.expect()
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            average.note_backward(torch.ones((), device="cuda:1"))
            average.note(reversed(list(model.parameters())))
        average.expect()
        found = average.without(target)
        assert average.multiplier is not None
        assert (average.share * average.multiplier).ndim == 0
    assert [vector.device for vector in found.values()] == [parameter.device for parameter in model.parameters()]
