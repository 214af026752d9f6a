"""Ids survive what TRL does to a dataset, and weights reach the examples."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset

from equipoise.errors import InvalidRequestError
from equipoise.testing import ServerProcess
from equipoise.transformers import PolicyTraining
from tests.client.torch.trl.formulas import spelt, token_mean
from tests.client.torch.trl.jobs import (
    N,
    checked,
    client_of,
    dataset,
    examples,
    llama,
    under_policy,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.mark.parametrize("options", [{}, {"packing": True, "max_length": 32}])
def test_streams_bring_their_ids(server: ServerProcess, tmp_path: Path, options: dict[str, Any]) -> None:
    def stream(*, ids: bool) -> Any:
        rows = examples("text", N, 0)
        return IterableDataset.from_generator(
            lambda: iter([{**row, "number": N - 1 - i} if ids else row for i, row in enumerate(rows)])
        )

    settings, made = checked()
    with client_of(server, f"streams-{len(options)}") as client:
        policy = PolicyTraining(client, target=dataset("text", 6, 1), id_column="number", options=settings)
        with pytest.raises(
            InvalidRequestError, match="number: must be a column of a training dataset without a length"
        ):
            under_policy("sft", llama(), tmp_path, stream(ids=False), policy, **options)
        under_policy("sft", llama(), tmp_path, stream(ids=True), policy, **options).train()
        ids, fields = client.sent[0]
    assert max(made[0].errors()) < 1e-6
    model, rows = llama(), examples("text", N, 0)
    losses = [float(token_mean(model, *spelt(rows[N - 1 - i])).detach()) for i in ids]
    assert fields["losses"] == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"packing": True, "max_length": 32}])
def test_examples_have_names(server: ServerProcess, tmp_path: Path, options: dict[str, Any]) -> None:
    """Of a dataset that is a choice from another, in another order."""
    rows = [{**row, "name": f"example {i:02}"} for i, row in enumerate(examples("text", N, 0))]
    train = Dataset.from_list(rows).select(range(N - 1, -1, -1))
    settings, made = checked()
    with client_of(server, f"names-{len(options)}") as client:
        policy = PolicyTraining(client, target=dataset("text", 6, 1), id_column="name", options=settings)
        trainer = under_policy("sft", llama(), tmp_path, train, policy, **options)
        trainer.train()
        ids, fields = client.sent[0]
    assert max(made[0].errors()) < 1e-6
    model = llama()
    named = {row["name"]: row for row in rows}
    losses = [float(token_mean(model, *spelt(named[trainer.example_keys[i]])).detach()) for i in ids]
    assert fields["losses"] == pytest.approx(losses, rel=1e-6)


def test_weights_reach_the_examples_of_packed_rows(server: ServerProcess, tmp_path: Path) -> None:
    """One step under served weights moves the model as a step made by hand does: Σ weight·tokens·loss / Σ tokens."""
    with client_of(server, "reach") as client:
        client.step(np.arange(N), contributions=np.where(np.arange(N) % 2, 1.0, -1.0))
        served = torch.tensor(client.read(np.arange(N)).weights).double()
        policy = PolicyTraining(client, target=dataset("text", 6, 1))
        model, step = llama(), {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
        packing = {"packing": True, "max_length": 32, "gradient_accumulation_steps": 2}
        trainer = under_policy("sft", model, tmp_path, dataset("text"), policy, max_steps=1, **step, **packing)
        trainer.train()
        [(ids, _)] = client.sent
    expected, rows = llama(), examples("text", N, 0)
    tokens = torch.tensor([len(spelt(rows[i])[0]) - 1 for i in ids]).double()
    losses = torch.stack([token_mean(expected, *spelt(rows[i])) for i in ids])
    (served[ids] * tokens * losses / tokens.sum()).sum().backward()
    assert served.min() < 0.5 < served.max()
    for before, after in zip(expected.parameters(), model.parameters(), strict=True):
        assert before.grad is not None
        torch.testing.assert_close(after, before - 0.1 * before.grad, rtol=1e-6, atol=1e-8)
