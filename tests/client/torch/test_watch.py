"""What is checked while training goes on: first examples, sums, and Σ s·c = ⟨V, gradient⟩."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equipoise.torch import (
    ContributionsDifferError,
    FiniteDifferenceContributions,
    GhostContributions,
    JvpContributions,
    LastLayerContributions,
    OnePassContributions,
    SketchContributions,
    TargetDirection,
    WeightedSteps,
)
from equipoise.torch.layers import DenseLayer
from tests.client.torch.models import gpt2, lm_losses, reference, relative_error, tokens
from tests.client.torch.zoo import Attention, mlp, shaken, squares, vectors

COUNT = 6


def prepared() -> tuple[nn.Module, TargetDirection, Tensor]:
    torch.manual_seed(0)
    model = shaken(mlp())
    return model, TargetDirection(model, squares, [vectors(5)()], refresh_every=2), vectors(5)()


def step(contributions: Any, x: Tensor, extra: Any = None) -> Tensor:
    with contributions.capture(range(COUNT)) as capture:
        total = (capture.losses(x) * torch.linspace(0.5, 1.5, COUNT)).mean()
        (total if extra is None else total + extra()).backward()
    found: Tensor = capture.contributions
    return found


@pytest.mark.parametrize("build", [mlp, Attention])
def test_contributions_and_gradient_belong_together(build: Any, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, batch = shaken(build()), vectors(4, 8) if build is Attention else vectors(5)
    contributions = GhostContributions(model, TargetDirection(model, squares, [batch()], refresh_every=2))
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            step(contributions, batch())
    assert (contributions.coverage.watched, contributions.coverage.gaps) == (3, 0)
    assert not caplog.records


def test_another_loss_in_the_backward_pass_is_told_with_the_module_it_is_in(caplog: pytest.LogCaptureFixture) -> None:
    """On the outputs of another forward pass: contributions are right, and the model learns something else too."""
    model, direction, x = prepared()
    contributions = GhostContributions(model, direction)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            found = step(contributions, x, lambda: 0.1 * model[2](vectors(4)()).square().mean())
            assert relative_error(found, reference(model, direction, x)) < 1e-10
    [record] = caplog.records  # once
    assert "Most of it is in 2 (Linear)." in record.message
    assert "Is there another loss in the backward pass than the ones given" in record.message
    assert (contributions.coverage.watched, contributions.coverage.gaps) == (2, 2)


def test_another_loss_on_the_same_outputs_is_refused() -> None:
    model, direction, x = prepared()
    with GhostContributions(model, direction).capture(range(COUNT)) as capture:
        y = model(x)
        losses = capture.watch(squares(lambda _x: y, x))
        (losses.mean() + 0.1 * y.square().mean()).backward()
    with pytest.raises(
        ContributionsDifferError, match=r"examples add up to .* use JvpContributions\(model, direction\)"
    ):
        capture.fields()
    assert relative_error(step(JvpContributions(model, direction), x), reference(model, direction, x)) < 1e-10


def test_examples_with_weight_zero_are_not_compared() -> None:
    model, direction, x = prepared()
    contributions = GhostContributions(model, direction)
    contributions.verify_first(3)
    with contributions.capture(range(COUNT)) as capture:
        (capture.losses(x) * torch.tensor([1.0, 0, 1, 1, 0, 1])).mean().backward()
    assert capture.contributions.isnan().tolist() == [False, True, False, False, True, False]


@pytest.mark.parametrize(
    "method",
    [GhostContributions, OnePassContributions, JvpContributions, FiniteDifferenceContributions],
)
@pytest.mark.parametrize("wrong", [False, True])
def test_the_first_step_is_verified(method: Any, wrong: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A direction that is changed behind the method's back stands for whatever makes a method wrong."""
    model, direction, x = prepared()
    contributions = method(model, direction)
    contributions.verify_first()
    with contributions.capture(range(COUNT)) as capture, caplog.at_level(logging.INFO):
        losses = capture.losses(x)
        if wrong:
            capture._expected = -capture._expected
        if method is OnePassContributions and not wrong:
            capture.backward(torch.ones(COUNT))
        elif losses.requires_grad:
            losses.mean().backward()
        if wrong:
            with pytest.raises(ContributionsDifferError, match=r"off by 2\b.* of those by per-example gradients"):
                capture.fields()
            return
        capture.fields()
    assert sum("Contributions of 4 examples were verified" in record.message for record in caplog.records) == 1


def test_trainers_verify_unless_told_otherwise() -> None:
    class Silent:
        def weights(self, ids: Any) -> Any:
            import numpy as np

            return np.ones(len(ids), np.float32)

        def submit(self, ids: Any = None, **fields: Any) -> None: ...

    for verify in (True, False):
        model, direction, x = prepared()
        steps = WeightedSteps(Silent(), GhostContributions(model, direction), verify=verify)
        for number in range(2):
            with steps.capture(range(COUNT)) as taken:
                taken.loss(x).backward()
                assert (taken.capture._expected is not None) == (verify and number == 0)


@pytest.mark.parametrize("method", [LastLayerContributions, SketchContributions])
def test_approximations_are_not_verified(method: Any) -> None:
    model, _, x = prepared()
    contributions = method(model.float(), TargetDirection(model, squares, [x.float()]))
    contributions.verify_first()
    with contributions.capture(range(COUNT)) as capture:
        capture.losses(x.float()).mean().backward()
    assert capture.fields()["scored"].all()  # type: ignore[union-attr]


def test_a_formula_that_is_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, direction, x = prepared()
    right = DenseLayer.contract

    def wrong(layer: Any, *given: Any) -> Tensor:
        return right(layer, *given) * (1 + 0.01 * layer.module.out_features)

    monkeypatch.setattr(DenseLayer, "contract", wrong)
    with pytest.raises(ContributionsDifferError, match="add up to"):
        step(GhostContributions(model, direction), x)


def test_half_precision_passes_its_checks() -> None:
    torch.manual_seed(0)
    model, batch = gpt2(), tokens(8)
    contributions = GhostContributions(model, TargetDirection(model, lm_losses, [tokens(8, seed=1)], refresh_every=1))
    contributions.verify_first()
    for _ in range(3):
        with contributions.capture(range(8)) as capture:
            with torch.autocast("cpu", torch.bfloat16):
                losses = capture.losses(batch)
            losses.mean().backward()
        capture.fields()
    assert (contributions.coverage.watched, contributions.coverage.gaps) == (3, 0)


def test_targets_that_are_not_finite_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    model, _, x = prepared()
    bad = vectors(5)()
    bad[0] = torch.nan
    direction = TargetDirection(model, squares, [x], guard_batches=[bad], refresh_every=1)
    contributions = GhostContributions(model, direction)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            with contributions.capture(range(COUNT)) as capture:
                capture.losses(x).mean().backward()
            fields = capture.fields()
            assert "guard_loss" not in fields
            assert "target_loss" in fields
    [record] = caplog.records
    assert "guard_loss = nan is left out" in record.message
    assert direction.unusable == 3
    contributions = GhostContributions(model, TargetDirection(model, squares, [bad]))
    with contributions.capture(range(COUNT)) as capture:
        capture.losses(x).mean().backward()
    fields = capture.fields()
    assert "target_loss" not in fields
    assert not fields["scored"].any()  # type: ignore[union-attr]
    assert contributions.coverage.gaps == 0


def test_a_batch_that_is_not_finite_is_not_surveyed() -> None:
    model, direction, x = prepared()
    contributions = GhostContributions(model, direction)
    bad = x.clone()
    bad[2] = torch.nan
    assert step(contributions, bad).isnan().all()
    assert relative_error(step(contributions, x), reference(model, direction, x)) < 1e-10
    assert step(contributions, bad).isnan().tolist() == [number == 2 for number in range(COUNT)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_direction_of_many_batches_is_not_lost_in_half_precision(dtype: torch.dtype) -> None:
    """Neither in its sum nor where it is small."""
    torch.manual_seed(0)
    model = nn.Linear(5, 4).to(dtype)
    batch = torch.randn(3, 5).to(dtype)

    def losses_of(model: nn.Module, x: Tensor) -> Tensor:
        return 1e-3 * model(x).float().square().mean(1)

    single = TargetDirection(model, losses_of, [batch])
    many = TargetDirection(model, losses_of, [batch] * 600)
    for direction in (single, many):
        direction.refresh()
    for parameter, vector in single.vectors.items():
        assert vector.dtype == torch.float32
        torch.testing.assert_close(many.vectors[parameter], vector, rtol=1e-4, atol=0)
    small = TargetDirection(model, lambda m, x: 1e-4 * losses_of(m, x), [batch])
    found = []
    for direction in (single, small):
        with GhostContributions(model, direction).capture(range(3)) as capture:
            (64 * capture.watch(losses_of(model, batch))).sum().backward()
        found.append(capture.contributions)
    precise = model.float()
    direction = TargetDirection(precise, losses_of, [batch.float()])
    direction.refresh()
    expected = reference(precise, direction, batch.float())
    assert relative_error(found[0], expected) < 2e-2
    assert relative_error(1e4 * found[1], expected) < (2e-2 if dtype == torch.bfloat16 else 1e-1)
