"""Losses that are given by the user."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from equipoise.testing import ServerProcess
from equipoise.transformers import PolicyTraining
from tests.client.torch.trl.formulas import spelt, token_mean
from tests.client.torch.trl.jobs import (
    N,
    PolicySFT,
    checked,
    client_of,
    config,
    dataset,
    examples,
    llama,
    tokenizer,
    under_policy,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


def test_losses_of_ones_own(server: ServerProcess, tmp_path: Path) -> None:
    """They are weighed instead of TRL's, as a mean over examples."""

    def losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        each = F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none", label_smoothing=0.1)
        return each.sum(1) / 10

    settings, made = checked()
    with client_of(server, "own") as client:
        policy = PolicyTraining(client, target=dataset("text", 6, 1), losses=losses, options=settings)
        trainer = under_policy("sft", llama(), tmp_path, dataset("text"), policy, gradient_accumulation_steps=2)
        trainer.train()
    assert max(made[0].errors()) < 1e-6
    first = torch.stack([capture._losses.mean() for capture in made[0].captures[:2]]).mean()  # type: ignore[union-attr]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(first), rel=1e-6)


class Smoothed(PolicySFT):
    """A loss of its own, beside TRL's class."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        logits = model(**{**inputs, "labels": None}).logits[:, :-1]
        each = F.cross_entropy(logits.transpose(1, 2), inputs["labels"][:, 1:], reduction="none", label_smoothing=0.1)
        return self.weigh(each.sum(1) / 10)


def test_a_class_of_ones_own(server: ServerProcess, tmp_path: Path) -> None:
    settings, made = checked()
    with client_of(server, "smoothed") as client:
        policy = PolicyTraining(client, target=dataset("text", 6, 1), options=settings)
        args = config("sft", tmp_path, gradient_accumulation_steps=2)
        given = {"args": args, "train_dataset": dataset("text"), "processing_class": tokenizer()}
        trainer = Smoothed(llama(), policy=policy, **given)
        trainer.train()
    assert len(made[0].errors()) == 6
    assert max(made[0].errors()) < 1e-6
    first = torch.stack([capture._losses.mean() for capture in made[0].captures[:2]]).mean()  # type: ignore[union-attr]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(first), rel=1e-6)


def test_losses_of_ones_own_in_packed_rows(server: ServerProcess, tmp_path: Path) -> None:
    """The batch is TRL's; there is a loss for each example in it."""

    def losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
        labels = F.pad(batch["labels"][0, 1:], (0, 1), value=-100)
        each = F.cross_entropy(model(**{**batch, "labels": None}).logits[0], labels, reduction="none")
        segments = batch["seq_idx"][0].long()
        return each.new_zeros(int(segments.max()) + 1).index_add(0, segments, each)

    settings, made = checked()
    with client_of(server, "own-packed") as client:
        policy = PolicyTraining(client, target=dataset("text", 6, 1), losses=losses, options=settings)
        under_policy("sft", llama(), tmp_path, dataset("text"), policy, packing=True, max_length=32).train()
        ids, fields = client.sent[0]
    assert len(made[0].errors()) == 3
    assert max(made[0].errors()) < 1e-6
    model, rows = llama(), examples("text", N, 0)
    alone = [float(token_mean(model, *spelt(rows[i])).detach()) * (len(spelt(rows[i])[0]) - 1) for i in ids]
    assert fields["losses"] == pytest.approx(alone, rel=1e-6)
