"""Trainers of frameworks in two processes: the contributions, and the step, of one process with all the data."""

from pathlib import Path
from typing import Any

import pytest
import torch

from equipoise.torch import TargetDirection
from tests.client.torch import two_trainers
from tests.client.torch.models import gpt2, lm_losses, reference, relative_error, tokens
from tests.client.torch.two_trainers import TRAINERS, N, target_batches
from tests.pairs import run_pair

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainers")
    run_pair(two_trainers.process, str(folder))
    return folder


@pytest.mark.parametrize("name", TRAINERS)
def test_two_processes_take_one_step_of_one(folder: Path, name: str) -> None:
    """Each sends the statistics of its own rows; together they train on the weighted mean of all."""
    bound = 1e-2 if name.endswith("-sharded") else 1e-4  # by finite differences
    results: list[Any] = [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(2)]
    model = gpt2()
    direction = TargetDirection(model, lm_losses, target_batches())
    direction.refresh()
    all_ids: list[int] = []
    for sent, _ in results:
        [(ids, fields)] = sent
        batch = {key: values[ids] for key, values in tokens(N, seed=0, padded=True).items()}
        assert relative_error(torch.tensor(fields["contributions"]), reference(model, direction, batch)) < bound
        assert fields["target_loss"] == pytest.approx(direction.target_loss.item(), rel=1e-5)  # type: ignore[union-attr]
        all_ids += ids
    assert len(set(all_ids)) == 16
    whole = {key: values[all_ids] for key, values in tokens(N, seed=0, padded=True).items()}
    ((torch.tensor(all_ids) + 1) / 16 * lm_losses(model, whole)).mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    for _, state in results:
        torch.testing.assert_close(dict(state), dict(model.state_dict()), rtol=1e-4, atol=1e-6)
