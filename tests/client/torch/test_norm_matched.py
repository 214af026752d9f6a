"""Norm-matched contributions: ⟨V − (V·ḡ / ḡ·ḡ)·ḡ, ∇l_n⟩ by every method, ḡ being what the optimizer stepped with."""

import gc
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import optimizer as optimizers

from equipoise.torch import (
    CaptureError,
    FiniteDifferenceContributions,
    GhostContributions,
    JvpContributions,
    OnePassContributions,
    SketchContributions,
    TargetDirection,
    TrainingOptions,
    WeightedSteps,
    weighted_mean,
)
from tests.client.torch import test_lightning, test_transformers
from tests.client.torch.models import class_losses, relative_error
from tests.servers import ServerProcess

pytestmark = test_lightning.pytestmark

COUNT, TARGET, REFRESH, MICRO_BATCHES, CLIP = 6, 20, 3, 2, 0.05
WEIGHTS = torch.linspace(0.2, 2.0, COUNT, dtype=torch.float64)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batch(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=generator)


def flat_gradient(loss: Tensor, model: nn.Module) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)])


def by_definition(model: nn.Module, data: Any, v: Tensor, average: Tensor | None) -> Tensor:
    """c_n − (V·ḡ / ḡ·ḡ)·(g_n·ḡ) from one gradient per example: [B]."""
    each = torch.stack([flat_gradient(loss, model) for loss in class_losses(model, data)])
    c = each @ v
    return c if average is None else c - (v @ average) / (average @ average) * (each @ average)


def backward(capture: Any, losses: Tensor) -> None:
    if hasattr(capture, "backward"):
        capture.backward(WEIGHTS / MICRO_BATCHES)
    else:
        (weighted_mean(losses, WEIGHTS) / MICRO_BATCHES).backward()


METHODS: list[tuple[Callable[..., Any], float]] = [
    (GhostContributions, 1e-9),
    (OnePassContributions, 1e-9),
    (JvpContributions, 1e-9),
    (partial(FiniteDifferenceContributions, step=1e-6), 1e-4),
    (partial(SketchContributions, width=1000), 1e-5),  # sketches are float32
]


@pytest.mark.parametrize(("method", "tolerance"), METHODS)
def test_they_are_what_the_formula_says(method: Callable[..., Any], tolerance: float) -> None:
    """With accumulated and clipped gradients, V refreshed every few captures, ḡ following each step of the optimizer.

    Everything on the other side is computed by autograd from losses, without `.grad`.
    """
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    direction = TargetDirection(model, class_losses, [batch(TARGET, 99)], refresh_every=REFRESH, norm_matched=True)
    contributions, taken = method(model, direction), 0
    average: Tensor | None = None
    for step in range(6):
        total = 0.0
        for part in range(MICRO_BATCHES):
            data = batch(COUNT, 10 * step + part)
            if taken % REFRESH == 0:
                v = flat_gradient(class_losses(model, batch(TARGET, 99)).mean(), model)
            expected, plain = by_definition(model, data, v, average), by_definition(model, data, v, None)
            total = total + flat_gradient((WEIGHTS * class_losses(model, data)).mean() / MICRO_BATCHES, model)
            with contributions.capture(range(COUNT)) as capture:
                backward(capture, capture.losses(data))
            assert relative_error(capture.contributions, expected) < tolerance
            assert capture.fields()["scored"].tolist() == [step > 0] * COUNT
            if step and taken % REFRESH == 0:
                assert relative_error(capture.plain_contributions, plain) < tolerance
                assert relative_error(expected, plain) > 0.1
            else:
                assert capture.plain_contributions is None
            if "gradient_sketches" in capture.fields():
                products = capture.fields()["gradient_sketches"] @ capture.fields()["target_sketch"]
                assert relative_error(torch.tensor(products), expected) < tolerance
            taken += 1
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        stepped = total * min(1.0, CLIP / (float(total.norm()) + 1e-6))
        optimizer.step()
        optimizer.zero_grad()
        average = stepped if average is None else 0.9 * average + 0.1 * stepped
    coverage = getattr(contributions, "coverage", None)
    if type(contributions) is GhostContributions:
        assert (coverage.watched, coverage.gaps) == (taken // REFRESH, 0)  # Σ s·c = ⟨V, gradient⟩ of this direction


def test_preconditioned_length_is_that_of_the_optimizer_s_step() -> None:
    """The derivative of ⟨∇L, step⟩/|step| by an example's weight, step = P·ḡ, times |step|: by differentiating it."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    direction = TargetDirection(
        model, class_losses, [batch(TARGET, 99)], refresh_every=1, norm_matched=True, preconditioner=optimizer
    )
    contributions = GhostContributions(model, direction)
    for step in range(2):
        data = batch(COUNT, step)
        with contributions.capture(range(COUNT)) as capture:
            capture.losses(data).mean().backward()
        if step == 0:
            average = torch.cat([p.grad.flatten() for p in model.parameters()])
            optimizer.step()
            optimizer.zero_grad()
    states = [optimizer.state[p] for p in model.parameters()]
    p = torch.cat([(1 / ((s["exp_avg_sq"] / (1 - 0.999)).sqrt() + 1e-8)).flatten() for s in states])
    target = flat_gradient(class_losses(model, batch(TARGET, 99)).mean(), model)
    each = torch.stack([flat_gradient(loss, model) for loss in class_losses(model, data)])
    extra = torch.zeros(COUNT, dtype=torch.float64, requires_grad=True)
    moved = p * (average + extra @ each)
    [gain] = torch.autograd.grad(target @ moved / moved.norm(), extra)
    assert relative_error(capture.contributions, gain * (p * average).norm()) < 1e-9


@pytest.mark.parametrize("fused", [False, True])
def test_scaled_gradients_are_unscaled_and_steps_that_are_left_out_do_not_count(fused: bool) -> None:
    def vectors(*, scale: float, spoilt: bool) -> list[Tensor]:
        model = network().float()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
        direction = TargetDirection(model, class_losses, [batch_of(99)], refresh_every=1, norm_matched=True)
        contributions = GhostContributions(model, direction)
        for step in range(3):
            if spoilt and step == 2:
                with contributions.capture(range(COUNT)) as capture:
                    scaler.scale(capture.losses(batch_of(7)).mean() * float("inf")).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
            with contributions.capture(range(COUNT)) as capture:
                scaler.scale(capture.losses(batch_of(step)).mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        contributions.capture(range(COUNT))
        return list(direction.vectors.values())

    def batch_of(seed: int) -> tuple[Tensor, Tensor]:
        x, y = batch(COUNT, seed)
        return x.float(), y

    torch.testing.assert_close(vectors(scale=2.0**12, spoilt=True), vectors(scale=1.0, spoilt=False))


def test_only_steps_after_a_capture_count_each_once() -> None:
    """Optimizers within optimizers, of other models, and steps of which nothing was captured."""

    class Outer(torch.optim.SGD):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, lr=0.0)
            self.inner = torch.optim.SGD(parameters, lr=0.1)

        def step(self, closure: Any = None) -> None:
            self.inner.step()

    model, other = network(), network()
    direction = TargetDirection(model, class_losses, [batch(TARGET, 99)], norm_matched=True)
    contributions = GhostContributions(model, direction)
    outer = Outer(list(model.parameters()))
    average: Tensor | None = None
    for step in range(3):
        data = batch(COUNT, step)
        gradient = flat_gradient(class_losses(model, data).mean(), model)
        with contributions.capture(range(COUNT)) as capture:
            capture.losses(data).mean().backward()
        outer.step()
        average = gradient if average is None else 0.9 * average + 0.1 * gradient
        outer.zero_grad()
        for trained in (model, other):
            class_losses(trained, batch(COUNT, 50)).mean().backward()
            torch.optim.SGD(trained.parameters(), lr=0.1).step()
            trained.zero_grad()
    v = torch.cat([vector.flatten() for vector in direction.plain.values()])
    contributions.capture(range(COUNT))
    found = torch.cat([vector.flatten() for vector in direction.vectors.values()])
    assert average is not None
    torch.testing.assert_close(found, v - (v @ average) / (average @ average) * average)


def test_a_direction_that_is_let_go_of_is_gone() -> None:
    hooks = optimizers._global_optimizer_post_hooks
    gc.collect()  # what other tests have let go of
    before = len(hooks)
    direction = TargetDirection(network(), class_losses, [batch(2, 0)], norm_matched=True)
    gone = weakref.ref(direction)
    assert len(hooks) == before + 1
    del direction
    gc.collect()
    assert gone() is None
    assert len(hooks) == before


class Silent:
    """A policy that says nothing, and keeps what it is told."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    def weights(self, ids: Any) -> Any:
        return np.linspace(0.5, 1.5, len(ids), dtype=np.float32)

    def submit(self, ids: Any = None, **fields: Any) -> None:
        self.sent.append(fields)


def test_updates_that_no_optimizer_makes_are_asked_for() -> None:
    def descend(model: nn.Module) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None

    for told in (False, True):
        model, client = network(), Silent()
        direction = TargetDirection(model, class_losses, [batch(TARGET, 99)], norm_matched=True)
        steps = WeightedSteps(client, GhostContributions(model, direction))
        with steps.capture(range(COUNT)) as step:
            step.loss(batch(COUNT, 0)).backward()
        if told:
            direction.note_gradients()
        descend(model)
        if told:
            with steps.capture(range(COUNT)) as step:
                step.loss(batch(COUNT, 1)).backward()
            assert client.sent[1]["scored"].all()
        else:
            remedies = r"call `direction.note_gradients\(\)` before `.grad` is cleared, .*norm_matched=False"
            with pytest.raises(CaptureError, match=remedies):
                steps.capture(range(COUNT))


def test_sim_of_plain_contributions_is_logged() -> None:
    """SIM by its definition: mean under the weights over the deviation around it, divisor count - 1."""
    model, client = network(), Silent()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    direction = TargetDirection(model, class_losses, [batch(TARGET, 99)], refresh_every=1, norm_matched=True)
    steps = WeightedSteps(client, GhostContributions(model, direction))
    for step in range(2):
        assert "policy/plain_sim" not in steps.metrics()
        v = flat_gradient(class_losses(model, batch(TARGET, 99)).mean(), model)
        plain = by_definition(model, batch(COUNT, step), v, None).numpy()
        with steps.capture(range(COUNT)) as captured:
            captured.loss(batch(COUNT, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = client.weights(range(COUNT))
    mean = (weights * plain).sum() / weights.sum()
    expected = mean / np.sqrt(((plain - mean) ** 2).sum() / (COUNT - 1))
    assert steps.metrics()["policy/plain_sim"] == pytest.approx(expected, rel=1e-6)


def test_a_trainer_of_transformers_sends_them(server: ServerProcess, tmp_path: Path) -> None:
    """Accumulating and clipping; contributions are scored from the second step on, and are not the plain ones."""
    sent = {}
    for matched in (False, True):
        with test_transformers.client_of(server, f"transformers-matched-{matched}".lower()) as client:
            options = {"options": TrainingOptions(norm_matched=matched, refresh_every=1)}
            trainer = test_transformers.trainer_of(
                client, tmp_path, policy=options, gradient_accumulation_steps=2, max_steps=2
            )
            trainer.train()
            sent[matched] = [fields for _, fields in client.sent]
    assert [bool(fields["scored"].any()) for fields in sent[True]] == [False, True]
    assert sent[True][1]["scored"].all()
    plain, matched = (torch.tensor(sent[m][1]["contributions"]) for m in (False, True))
    assert relative_error(matched, plain.double()) > 0.01


def test_a_trainer_of_lightning_sends_them(server: ServerProcess, tmp_path: Path) -> None:
    """Whose optimizers step with a closure that makes the backward pass."""
    with test_lightning.client_of(server, "lightning-matched") as client:
        policy = test_lightning.PolicyCallback(
            client,
            test_lightning.losses_of,
            list(test_lightning.batches(9, 1, 4)),
            options=TrainingOptions(norm_matched=True, refresh_every=1),
        )
        model = test_lightning.Model(policy)
        trainer: lightning.Trainer = test_lightning.trainer_of(policy, tmp_path, max_steps=3)
        trainer.fit(model, test_lightning.batches(24, 0, 4))
        assert [bool(fields["scored"].all()) for _, fields in client.sent] == [False, True, True]
