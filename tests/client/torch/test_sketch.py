"""Sketches of gradients: right in mean over the projections, linear, and told to the server as such."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from equipoise import PolicyClient
from equipoise.torch import (
    CaptureError,
    GhostContributions,
    SketchContributions,
    TargetDirection,
    UnsupportedModuleError,
    join,
    weighted_mean,
)
from tests.client.torch.models import gpt2, llama, lm_losses, relative_error, square_losses, tokens
from tests.patience import PATIENT
from tests.servers import serve

COUNT = 24
WEIGHTS = torch.linspace(0.25, 2.0, COUNT)
WIDE = 10_000
"""So wide that nothing is projected: the sketch is the gradient."""

MODELS = pytest.mark.parametrize("build", [gpt2, llama])


def target(model: nn.Module) -> TargetDirection:
    return TargetDirection(model, lm_losses, [tokens(8, seed=1), tokens(5, seed=2, padded=True)])


def captured(contributions: Any, batch: Any, weights: Tensor = WEIGHTS) -> Any:
    with contributions.capture(range(COUNT)) as capture:
        losses = capture.losses(batch)
        weighted_mean(losses, weights).backward()
    return capture


def exact(model: nn.Module, batch: Any) -> Tensor:
    return captured(GhostContributions(model, target(model)), batch).contributions


@MODELS
@pytest.mark.parametrize("padded", [False, True])
def test_a_sketch_that_projects_nothing_is_exact(build: Callable[[], nn.Module], padded: bool) -> None:
    model, batch = build(), tokens(COUNT, padded=padded)
    capture = captured(SketchContributions(model, target(model), width=WIDE), batch)
    assert capture.sketches.shape == (COUNT, len(capture.target_sketch))
    products = capture.sketches.double() @ capture.target_sketch.double()
    assert relative_error(products, exact(model, batch)) < 1e-4
    assert relative_error(capture.contributions, exact(model, batch)) < 1e-4


@MODELS
def test_estimates_are_right_in_mean_over_the_projections(build: Callable[[], nn.Module]) -> None:
    model, batch = build(), tokens(COUNT, padded=True)
    draws = torch.stack(
        [
            captured(SketchContributions(model, target(model), width=4, seed=seed), batch).contributions
            for seed in range(60)
        ]
    ).double()
    expected = exact(model, batch)
    one = relative_error(draws[0], expected)
    assert one > 0.3  # a single draw is an estimate ...
    assert relative_error(draws.mean(0), expected) < 0.3 * one  # ... 60 draws have an eighth of its error
    deviations = (draws.mean(0) - expected) / (draws.std(0) / len(draws) ** 0.5)
    assert deviations.abs().max() < 5.0


def test_wider_sketches_rank_examples_better() -> None:
    model, batch = gpt2(), tokens(COUNT)
    expected = exact(model, batch)

    def rank(width: int) -> float:
        found = [
            captured(SketchContributions(model, target(model), width=width, seed=seed), batch).contributions
            for seed in range(8)
        ]
        return float(np.mean([spearmanr(each, expected).statistic for each in found]))

    narrow, medium, wide = rank(2), rank(8), rank(20)
    assert narrow < medium < wide
    assert wide > 0.85


def test_the_target_sketch_is_the_mean_of_the_target_examples_sketches() -> None:
    model = llama()  # no tied weights
    batch = tokens(COUNT, seed=9)
    direction = TargetDirection(model, lm_losses, [batch])
    capture = captured(SketchContributions(model, direction, width=5), batch)
    torch.testing.assert_close(capture.sketches.mean(0), capture.target_sketch, rtol=1e-3, atol=1e-5)


def test_the_seed_alone_decides_and_refreshes_keep_the_projections() -> None:
    batch, models = tokens(COUNT), [gpt2(), gpt2()]
    contributions = [SketchContributions(model, target(model), width=5, seed=3) for model in models]
    first, second = (captured(each, batch).fields() for each in contributions)
    np.testing.assert_array_equal(first["gradient_sketches"], second["gradient_sketches"])
    np.testing.assert_array_equal(first["target_sketch"], second["target_sketch"])
    contributions[0].direction.refresh()
    again = captured(contributions[0], batch).fields()
    np.testing.assert_allclose(again["gradient_sketches"], first["gradient_sketches"], rtol=1e-5, atol=1e-7)
    other = captured(SketchContributions(models[0], target(models[0]), width=5, seed=4), batch).fields()
    assert not np.allclose(other["gradient_sketches"], first["gradient_sketches"], rtol=1e-2)


def test_rows_trained_with_weight_zero_are_not_scored() -> None:
    model, weights = gpt2(), WEIGHTS.clone()
    weights[3] = 0.0
    fields = captured(SketchContributions(model, target(model), width=4), tokens(COUNT), weights).fields()
    assert "contributions" not in fields
    assert np.flatnonzero(fields["scored"] == 0).tolist() == [3]
    assert np.isnan(fields["gradient_sketches"]).any(axis=1).nonzero()[0].tolist() == [3]


def test_gradients_of_the_job_are_left_alone() -> None:
    model, batch = gpt2(), tokens(COUNT)
    expected = torch.autograd.grad(weighted_mean(lm_losses(model, batch), WEIGHTS), list(model.parameters()))
    captured(SketchContributions(model, target(model), width=4), batch)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7)


def test_micro_batches_of_one_direction_join_and_others_do_not() -> None:
    model = gpt2()
    contributions = SketchContributions(model, target(model), width=4)
    halves = [captured(contributions, tokens(COUNT, seed=seed)) for seed in (1, 2)]
    ids, fields = join(*halves)
    assert len(ids) == len(fields["gradient_sketches"]) == len(fields["losses"]) == 2 * COUNT
    np.testing.assert_array_equal(fields["target_sketch"], halves[0].target_sketch.numpy())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    contributions.direction.refresh()
    with pytest.raises(CaptureError, match="several target directions"):
        join(halves[0], captured(contributions, tokens(COUNT)))


@pytest.mark.parametrize(("options", "message"), [({"width": 0}, "width = 0"), ({"seed": -1}, "seed = -1")])
def test_bad_options_name_field_value_and_rule(options: dict[str, int], message: str) -> None:
    model = gpt2()
    with pytest.raises(ValueError, match=message):
        SketchContributions(model, target(model), **options)


def test_modules_without_a_projection_are_named() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(9, 4))
    direction = TargetDirection(model, square_losses, [(torch.randn(5, 2, 5), torch.randn(5, 4))])
    with pytest.raises(UnsupportedModuleError, match=r"0 \(Conv1d\).*sketches see through Linear"):
        SketchContributions(model, direction)


def test_a_server_s_contributions_are_the_trainer_s() -> None:
    model, batch = llama(), tokens(COUNT)
    capture = captured(SketchContributions(model, target(model), width=8), batch)
    products = (capture.sketches.double() @ capture.target_sketch.double()).float().numpy()
    with (
        serve() as server,
        PolicyClient(
            server.address, policy="sketched", num_examples=COUNT, rule="ema_relu", timeout=PATIENT
        ) as sketched,
        PolicyClient(server.address, policy="own", num_examples=COUNT, rule="ema_relu", timeout=PATIENT) as own,
    ):
        sketched.step(capture.ids, **capture.fields())
        own.step(capture.ids, contributions=products)
        np.testing.assert_allclose(sketched.read_weights("score"), own.read_weights("score"), rtol=1e-5, atol=1e-7)
