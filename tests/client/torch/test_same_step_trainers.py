"""Frameworks' trainers under rule `strata`, by their usual lines: weights of the same step, groups, sparse scoring."""

from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback, TrainingArguments

from equipoise import Timeout
from equipoise.errors import InvalidRequestError
from equipoise.lightning import PolicyCallback
from equipoise.torch import weighted_mean
from equipoise.torch.training import TrainingOptions
from equipoise.transformers import PolicyTrainer, PolicyTraining
from tests.client.torch.models import gpt2, lm_losses, tokens
from tests.client.torch.recording import Recording
from tests.servers import ServerProcess

N = 32
RATE = 0.1
QUICK = {"strata": 2, "groups": 2, "min_count": 4, "memory": 100, "lower_below": 0.0, "raise_above": 1.0}
"""Weights act after a step or two."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
]


def client_of(server: ServerProcess, name: str, **settings: Any) -> Recording:
    timeout = Timeout(step=30)
    return Recording(
        server.address,
        policy=f"strata-{name}",
        num_examples=N,
        rule="strata",
        settings=QUICK | settings,
        timeout=timeout,
    )


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    batch = tokens(count, seed=seed, padded=True)
    sequences = [{name: values[i].tolist() for name, values in batch.items()} for i in range(count)]
    return [row | {"source": i % 2} for i, row in enumerate(sequences)]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 8,
        "optim": "sgd",
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**(defaults | options))


def trainer_of(client: Recording, folder: Path, **options: Any) -> PolicyTrainer:
    training = TrainingOptions(norm_matched=True, refresh_every=1, measure_every=options.pop("measure_every", 1))
    policy = PolicyTraining(client, target=rows(12, 1), guard=rows(6, 2), group_column="source", options=training)
    return PolicyTrainer(
        gpt2(), arguments(folder, **options), train_dataset=rows(N, 0), eval_dataset=rows(4, 5), policy=policy
    )


def by_hand(model: nn.Module, losses: Any, asked: list[Any], *, accumulate: int) -> nn.Module:
    """SGD on the same batches under the weights that were given for them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for number, (ids, told, weights) in enumerate(asked, 1):
        found = losses(model, ids)
        torch.testing.assert_close(torch.tensor(told["losses"]), found.detach().float(), rtol=1e-3, atol=1e-4)
        (weighted_mean(found, weights) / accumulate).backward()
        if number % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return model


def test_hugging_face_trains_under_the_weights_of_the_step(server: ServerProcess, tmp_path: Path) -> None:
    """Each micro-batch has asked for its own, with its groups; contributions follow once for a step."""
    with client_of(server, "hf") as client:
        trainer = trainer_of(client, tmp_path)
        trainer.train()
        assert trainer.evaluate()["eval_loss"] > 0
        asked, sent = client.asked, client.sent
    assert [told["groups"].tolist() for _, told, _ in asked] == [[i % 2 for i in ids] for ids, *_ in asked]
    assert [ids for ids, _ in sent] == [asked[2 * n][0] + asked[2 * n + 1][0] for n in range(8)]
    assert [fields["step"] for _, fields in sent] == list(range(1, 9))
    assert not any("losses" in fields for _, fields in sent)
    used = np.concatenate([weights for *_, weights in asked])
    assert used.min() < 0.9 < 1.05 < used.max()
    means = [entry["policy/mean_weight"] for entry in trainer.state.log_history if "loss" in entry]
    assert means == pytest.approx([used[8 * n : 8 * n + 8].mean() for n in range(8)], rel=1e-4)
    whole = tokens(N, seed=0, padded=True)
    losses = lambda model, ids: lm_losses(model, {name: values[ids] for name, values in whole.items()})  # noqa: E731
    expected = by_hand(gpt2(), losses, asked, accumulate=2)
    for one, other in zip(trainer.model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


class Stop(TrainerCallback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.steps


@pytest.mark.parametrize("lost_steps", [0, 2])
def test_an_interrupted_job_goes_on_from_its_checkpoint(server: ServerProcess, tmp_path: Path, lost_steps: int) -> None:
    """To the same weights and the same model as one that was not interrupted, bit for bit; contributions of every
    third batch."""
    name, ends = f"hf-interrupted-{lost_steps}", []
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 5, "measure_every": 3}
    with client_of(server, f"{name}-whole") as client:
        trainer = trainer_of(client, tmp_path / "whole", **options)
        trainer.train()
        assert len(client.asked) == 16
        assert [len(ids) for ids, _ in client.sent] == [4] * 6  # micro-batches 1, 4, 7, 10, 13 and 16
        ends.append((client.read_weights(), trainer.model))
    with client_of(server, name) as client:
        trainer = trainer_of(client, tmp_path / "parts", **options)
        trainer.add_callback(Stop(5 + lost_steps))
        trainer.train()
    with client_of(server, name) as client:
        trainer = trainer_of(client, tmp_path / "parts", **options)
        trainer.train(resume_from_checkpoint=True)
        used = trainer.policy_client
        assert (used is client) == (not lost_steps)
        ends.append((used.read_weights(), trainer.model))
        used.close()
    (expected_weights, expected), (weights, model) = ends
    np.testing.assert_array_equal(weights, expected_weights)
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)


def test_labels_can_be_groups(server: ServerProcess, tmp_path: Path) -> None:
    """A column that the model takes is left in the batch."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(
        BertConfig(**sizes, intermediate_size=16, max_position_embeddings=16, num_labels=2)
    )
    examples = [{"input_ids": row["input_ids"], "label": i // 2 % 2} for i, row in enumerate(rows(N, 0))]
    with client_of(server, "hf-labels") as client:
        policy = PolicyTraining(client, target=examples[:8], group_column="label")
        PolicyTrainer(model, arguments(tmp_path, max_steps=2), train_dataset=examples, policy=policy).train()
        assert [told["groups"].tolist() for _, told, _ in client.asked] == [
            [i // 2 % 2 for i in ids] for ids, *_ in client.asked
        ]


@pytest.mark.parametrize(
    ("column", "message"),
    [("domain", "domain: must be a column of train_dataset"), ("note", "note = 'x': must hold integers in")],
)
def test_groups_that_are_none_are_named(server: ServerProcess, tmp_path: Path, column: str, message: str) -> None:
    with client_of(server, f"hf-no-{column}") as client:
        policy = PolicyTraining(client, target=rows(4, 1), group_column=column)
        train = [row | {"note": "x"} for row in rows(N, 0)]
        with pytest.raises(InvalidRequestError, match=message):
            PolicyTrainer(gpt2(), arguments(tmp_path), train_dataset=train, policy=policy).train()


def examples_of(count: int, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.linspace(-1, 1, 5)
    inputs = torch.randn(count, 5, generator=generator)
    return [{"id": torch.tensor(i), "x": x, "y": x @ truth * (-1 if i % 3 == 0 else 1)} for i, x in enumerate(inputs)]


def square_losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return (model(batch["x"]).squeeze(1) - batch["y"]).square()


class Model(lightning.LightningModule):
    def __init__(self, policy: PolicyCallback | None = None, *, own: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
        self.policy, self.own = policy, own

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        assert self.policy is not None
        ids, groups = batch["id"], batch["id"] % 2
        if self.own:
            return self.policy.weigh(ids, square_losses(self, batch), groups=groups)
        return self.policy.loss(ids, batch, groups=groups)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=RATE)


@pytest.mark.parametrize("own", [False, True])
def test_lightning_trains_under_the_weights_of_the_step(server: ServerProcess, tmp_path: Path, own: bool) -> None:
    loader = DataLoader(examples_of(N, 0), batch_size=4)  # type: ignore[arg-type]
    target = list(DataLoader(examples_of(9, 1), batch_size=4))  # type: ignore[arg-type]
    with client_of(server, f"lightning-{own}".lower()) as client:
        options = TrainingOptions(refresh_every=1, norm_matched=True, measure_every=2)
        policy = PolicyCallback(client, square_losses, target, options=options)
        model = Model(policy, own=own)
        lightning.Trainer(
            callbacks=[policy],
            default_root_dir=tmp_path,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            max_epochs=3,
            accumulate_grad_batches=2,
        ).fit(model, loader)
        asked, sent = client.asked, client.sent
    assert len(asked) == 24
    assert [told["groups"].tolist() for _, told, _ in asked] == [[i % 2 for i in ids] for ids, *_ in asked]
    assert [(ids, fields["step"]) for ids, fields in sent] == [(asked[2 * n][0], n + 1) for n in range(12)]
    used = np.concatenate([weights for *_, weights in asked])
    assert used.min() < 0.9 < 1.05 < used.max()
    whole = {name: torch.stack([row[name] for row in examples_of(N, 0)]) for name in ("x", "y")}
    losses = lambda model, ids: square_losses(model, {name: values[ids] for name, values in whole.items()})  # noqa: E731
    expected = by_hand(Model(), losses, asked, accumulate=2)
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()), rtol=1e-4, atol=1e-6)
