"""Two processes that train one model find the contributions, and the direction, of one process with all the data."""

from pathlib import Path
from typing import Any

import pytest
import torch

from equipoise.torch import FiniteDifferenceContributions, GhostContributions
from tests.client.torch import two_processes
from tests.client.torch.models import gpt2, lm_losses, relative_error
from tests.client.torch.two_processes import COUNT, alone, training
from tests.pairs import run_pair


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    run_pair(two_processes.process, str(folder))
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("ghost", GhostContributions),
        ("finite_difference", FiniteDifferenceContributions),
        ("sharded", FiniteDifferenceContributions),
        ("ghost, matched", GhostContributions),
        ("sharded, matched", FiniteDifferenceContributions),
    ],
)
def test_contributions_are_those_of_one_process(results: list[dict[str, Any]], name: str, method: Any) -> None:
    """Also after an optimizer's step: direction, preconditioner and training itself are shared rightly.

    In float64, since the first step of Adam makes much of a gradient's rounding.
    """
    expected, both = alone(method, matched="matched" in name), [result[name] for result in results]
    found = torch.cat([part["contributions"] for part in both], dim=1)
    assert found.shape == (two_processes.STEPS, COUNT)
    for step in range(two_processes.STEPS):
        assert relative_error(found[step], expected["contributions"][step]) < 1e-6
    for part in both:
        for key in ("target_loss", "guard_loss", "guard_now", "norm", "parameters"):
            torch.testing.assert_close(part[key], expected[key], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", two_processes.KINDS)
def test_replicas_of_every_kind(results: list[dict[str, Any]], name: str) -> None:
    """Contributions are right, checks pass, and gradients are the means over the processes as ever."""
    for result in results:
        found = result["kinds"][name]
        assert max(found["errors"]) < 1e-6
        assert found["gaps"] == 0
        torch.testing.assert_close(found["gradients"], found["expected"], rtol=1e-9, atol=1e-12)


def test_what_cannot_work_is_refused_with_what_does(results: list[dict[str, Any]]) -> None:
    for result in results:
        said = result["refusals"]
        assert said["one pass, replicated"].startswith("the model itself (DistributedDataParallel): gradients that are")
        assert said["one pass, replicated"].endswith(
            "use GhostContributions, or the model inside and reduce `.grad` yourself"
        )
        for method in ("ghost", "jvp"):
            assert "this process has a part of its parameters only" in said[f"{method}, sharded"]
            assert said[f"{method}, sharded"].endswith('TrainingOptions(method="finite_difference")')
        assert said["a part of the mesh"].startswith("model: a parameter is sharded over 1 of 2 processes")


def test_a_refresh_waits_for_gradients_that_are_not_reduced(results: list[dict[str, Any]]) -> None:
    model, batch = gpt2().double(), training()[0]
    losses = lm_losses(model, batch)
    expected = torch.autograd.grad(2 * losses.mean(), list(model.parameters()))
    for result in results:
        assert result["accumulating"]["ages"] == [0, 1, 0]
        torch.testing.assert_close(result["accumulating"]["gradients"], list(expected))
        torch.testing.assert_close(result["accumulating"]["kept"], list(expected))


def test_they_agree_on_what_only_one_of_them_knows(results: list[dict[str, Any]]) -> None:
    """Else one would wait for a sum, or a refresh, that the other does not make."""
    for result in results:
        assert result["agreed"] == {"multipliers": [torch.tensor(0.5, dtype=torch.float64), None], "norm_matched": True}


def test_a_sharded_direction_survives_a_checkpoint(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["restored"]["same"]
        torch.testing.assert_close(*result["restored"]["norms"])
