"""Every architecture of `transformers` that people train: contributions without any option."""

from typing import Any

import pytest
import torch

from equipoise.torch import (
    FiniteDifferenceContributions,
    GhostContributions,
    JvpContributions,
    TargetDirection,
    UnsupportedModuleError,
)
from tests.client.torch.architectures import ARCHITECTURES, COUNT
from tests.client.torch.models import reference, relative_error


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_hooks(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model, batch = architecture.build(), architecture.batch()
    direction = TargetDirection(model, architecture.losses, [batch])
    contributions = GhostContributions(model, direction)
    weights = torch.linspace(0.5, 1.5, COUNT, dtype=torch.float64)
    for _ in range(2):
        with contributions.capture(range(COUNT)) as capture:
            (capture.losses(batch) * weights).mean().backward()
        assert relative_error(capture.contributions, reference(model, direction, batch)) < 1e-6
    plan = contributions.coverage.plan
    assert plan is not None
    assert bool(plan.blocks) == ("forward mode" in architecture.how)  # as the table says


@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "OPT", "Mixtral", "BERT, masked", "ViT", "T5"])
def test_half_precision(name: str) -> None:
    """Under autocast, where its own checks pass too."""
    architecture = ARCHITECTURES[name]
    precise, batch = architecture.build(), architecture.batch()
    direction = TargetDirection(precise, architecture.losses, [batch])
    direction.refresh()
    right = reference(precise, direction, batch)
    batch = {key: value.float() if value.is_floating_point() else value for key, value in batch.items()}
    model = architecture.build().float()
    contributions = GhostContributions(model, TargetDirection(model, architecture.losses, [batch], refresh_every=1))
    contributions.verify_first()
    for _ in range(2):
        with contributions.capture(range(COUNT)) as capture:
            with torch.autocast("cpu", torch.bfloat16):
                losses = capture.losses(batch)
            losses.mean().backward()
        assert relative_error(capture.contributions, right) < 2e-2
    assert contributions.coverage.gaps == 0


def test_an_operation_without_forward_mode_is_refused_by_jvp_with_what_needs_none() -> None:
    """BLOOM has an activation of its own."""
    architecture = ARCHITECTURES["BLOOM"]
    model, batch = architecture.build(), architecture.batch()
    direction = TargetDirection(model, architecture.losses, [batch])
    direction.refresh()
    with (
        JvpContributions(model, direction).capture(range(COUNT)) as capture,
        pytest.raises(UnsupportedModuleError, match=r"has no forward mode .* use FiniteDifferenceContributions"),
    ):
        capture.losses(batch)
    with FiniteDifferenceContributions(model, direction).capture(range(COUNT)) as second:
        second.losses(batch)
    assert relative_error(second.contributions, reference(model, direction, batch)) < 2e-2


def test_grouped_kernels_of_experts() -> None:
    """In float32, which they need: `transformers` takes them by default."""
    architecture = ARCHITECTURES["Mixtral"]
    precise, batch = architecture.build(), architecture.batch()
    direction = TargetDirection(precise, architecture.losses, [batch])
    direction.refresh()
    right = reference(precise, direction, batch)
    model: Any = architecture.kind.from_config(architecture.config(), experts_implementation="grouped_mm")
    model.load_state_dict(precise.state_dict())
    model.config.use_cache = False
    for method in (GhostContributions, JvpContributions):
        with method(model, TargetDirection(model, architecture.losses, [batch])).capture(range(COUNT)) as capture:
            capture.losses(batch).mean().backward()
        assert relative_error(capture.contributions, right) < 1e-4
