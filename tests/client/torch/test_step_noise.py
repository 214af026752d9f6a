"""Contributions with the noise of a step in its length: V·∇l − (V·ḡ/q)·(ḡ·∇l + κ·s·|∇l|²), |∇l|² by random signs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equipoise.torch import (
    DirectionError,
    FiniteDifferenceContributions,
    GhostContributions,
    JvpContributions,
    LastLayerContributions,
    OnePassContributions,
    SketchContributions,
    TargetDirection,
    weighted_mean,
)
from tests.client.torch.models import class_losses, relative_error
from tests.client.torch.test_norm_matched import (
    CLIP,
    COUNT,
    MICRO_BATCHES,
    TARGET,
    WEIGHTS,
    backward,
    batch,
    flat_gradient,
    network,
)

KAPPA = 1.5


def flat(vectors: dict[nn.Parameter, Tensor], model: nn.Module) -> Tensor:
    return torch.cat([vectors[p].flatten() for p in model.parameters()])


def moved(average: Any, new: Any) -> Any:
    return new if average is None else 0.9 * average + 0.1 * new


@pytest.mark.parametrize("clip", [CLIP, 1e9])
@pytest.mark.parametrize("method", [GhostContributions, OnePassContributions, JvpContributions])
def test_they_are_what_the_formula_says(method: Callable[..., Any], clip: float) -> None:
    """With accumulated and clipped gradients; all but the signs is computed from losses, without `.grad`."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    direction = TargetDirection(
        model, class_losses, [batch(TARGET, 99)], refresh_every=1, norm_matched=True, step_noise=KAPPA
    )
    contributions = method(model, direction)
    average = square = multiplier = None
    for step in range(5):
        total = torch.zeros(())
        for part in range(MICRO_BATCHES):
            data = batch(COUNT, 10 * step + part)
            losses = class_losses(model, data)
            each = torch.stack([flat_gradient(loss, model) for loss in losses])
            v = flat_gradient(class_losses(model, batch(TARGET, 99)).mean(), model)
            total = total + flat_gradient((WEIGHTS * losses).mean() / MICRO_BATCHES, model)
            with contributions.capture(range(COUNT)) as capture:
                noise = capture._noise
                backward(capture, capture.losses(data))
            if average is None:
                assert relative_error(capture.contributions, each @ v) < 1e-9
                continue
            signs = flat(noise.signs, model)
            own = KAPPA * multiplier * (each @ signs).square()
            expected = each @ v - (v @ average) / square * (each @ average + own)
            assert relative_error(capture.contributions, expected) < 1e-9
            assert relative_error(each @ v - (v @ average) / square * (each @ average), expected) > 0.01
        factor = min(1.0, clip / (float(total.norm()) + 1e-6))
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        average = moved(average, total * factor)
        square = moved(square, (total * factor).square().sum())
        multiplier = moved(multiplier, float(WEIGHTS.mean()) / COUNT / MICRO_BATCHES * factor)


def test_the_square_of_a_product_with_random_signs_is_that_of_the_norm_in_the_mean() -> None:
    """Also for layers of one shape, whose signs must not be alike."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()
    direction = TargetDirection(model, class_losses, [batch(TARGET, 99)], norm_matched=True, step_noise=1.0)
    gradient = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    gradient[: 6 * 7] = gradient[6 * 7 : 2 * 6 * 7] = gradient[2 * 6 * 7 :]
    squares = []
    for _ in range(4000):
        signs = flat(direction._signs.draw(model.parameters()), model)
        assert (signs.abs() == 1).all()
        squares.append(float(gradient @ signs) ** 2)
    assert sum(squares) / len(squares) == pytest.approx(float(gradient @ gradient), rel=0.1)


def test_scaled_losses_and_gradients_make_no_difference() -> None:
    def found(scale: float) -> list[Tensor]:
        model, all_found = network(), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
        direction = TargetDirection(
            model, class_losses, [batch(TARGET, 99)], refresh_every=1, norm_matched=True, step_noise=KAPPA
        )
        contributions = GhostContributions(model, direction)
        for step in range(4):
            with contributions.capture(range(COUNT)) as capture:
                scaler.scale(weighted_mean(capture.losses(batch(COUNT, step)), WEIGHTS)).backward()
            all_found.append(capture.contributions)
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return all_found

    torch.testing.assert_close(found(2.0**12), found(1.0))


@pytest.mark.parametrize("method", [FiniteDifferenceContributions, LastLayerContributions, SketchContributions])
def test_what_does_not_see_it_leaves_it_out(method: Callable[..., Any]) -> None:
    def found(step_noise: float) -> list[Tensor]:
        model, all_found = network(), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        direction = TargetDirection(
            model, class_losses, [batch(TARGET, 99)], refresh_every=1, norm_matched=True, step_noise=step_noise
        )
        contributions = method(model, direction)
        for step in range(3):
            with contributions.capture(range(COUNT)) as capture:
                capture.losses(batch(COUNT, step)).mean().backward()
            all_found.append(capture.contributions)
            optimizer.step()
            optimizer.zero_grad()
        return all_found

    torch.testing.assert_close(found(2.0), found(0.0), rtol=0, atol=0)


def test_target_examples_count_alike_in_an_averaged_direction() -> None:
    """A last batch that is smaller moves the direction less."""
    model = network()
    batches = [batch(20, 1), batch(5, 2)]
    direction = TargetDirection(
        model, class_losses, batches, refresh_every=1, batches_per_refresh=1, momentum=0.8, norm_matched=True
    )
    for _ in range(2):
        direction.refresh()
    large, small = (flat_gradient(class_losses(model, data).mean(), model) for data in batches)
    kept = 0.8**0.25
    assert relative_error(flat(direction.plain, model), kept * large + (1 - kept) * small) < 1e-12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_noise": -1.0, "norm_matched": True}, "step_noise = -1.0: must be finite and not negative"),
        ({"step_noise": float("nan"), "norm_matched": True}, "step_noise = nan: must be finite and not negative"),
        ({"step_noise": 1.0}, "step_noise = 1.0: is for norm-matched contributions: give norm_matched=True"),
        ({"look_every": 0}, "look_every = 0: must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DirectionError, match=message):
        TargetDirection(network(), class_losses, [batch(TARGET, 99)], **options)
