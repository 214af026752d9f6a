"""One job under `strata`, by its default options: every framework comes to the same policy and the same model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import lightning
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from equipoise import Timeout
from equipoise.lightning import PolicyCallback
from equipoise.torch import weighted_steps
from equipoise.transformers import PolicyTrainer, PolicyTraining
from tests.client.torch.models import gpt2, lm_losses, tokens
from tests.client.torch.recording import Recording
from tests.servers import ServerProcess

N, BATCH, EPOCHS, RATE = 48, 8, 4, 0.5
SOON = {"strata": 4, "min_target_losses": 16, "target_memory": 64, "window": 32}
"""Weights act after two looks at the target, not after 24."""

Order: TypeAlias = list[list[int]]
Job: TypeAlias = Callable[[Recording, Order, Path], Any]

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
]


def rows(count: int, *, seed: int) -> list[dict[str, Any]]:
    """Half of the training text repeats one token, so that losses tell the halves apart."""
    batch = tokens(count, seed=seed)
    if seed == 0:
        batch["input_ids"][::2] = batch["input_ids"][::2, :1]
        batch["labels"] = batch["input_ids"].clone()
    return [{"id": i, **{name: values[i] for name, values in batch.items()}} for i in range(count)]


def target() -> list[Any]:
    return list(DataLoader(rows(32, seed=1), batch_size=BATCH))  # type: ignore[arg-type]


def batches(order: Order) -> DataLoader[Any]:
    return DataLoader(rows(N, seed=0), batch_sampler=order)  # type: ignore[arg-type]


def plain(client: Recording, order: Order, folder: Path) -> Any:
    model = gpt2()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    steps = weighted_steps(client, model, lm_losses, target())
    for batch in batches(order):
        with steps.capture(batch["id"]) as step:
            step.loss(batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    return model


def accelerated(client: Recording, order: Order, folder: Path) -> Any:
    accelerator, model = Accelerator(cpu=True), gpt2()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    model, optimizer = accelerator.prepare(model, optimizer)
    steps = weighted_steps(client, model, lm_losses, target(), accelerator=accelerator)
    for batch in batches(order):
        with accelerator.accumulate(model), steps.capture(batch["id"]) as step:
            accelerator.backward(step.loss(batch))
            optimizer.step()
            optimizer.zero_grad()
    return model


class Module(lightning.LightningModule):
    def __init__(self, policy: PolicyCallback) -> None:
        super().__init__()
        self.net, self.policy = gpt2(), policy

    def forward(self, **inputs: Tensor) -> Any:
        return self.net(**inputs)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.policy.loss(batch["id"], batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=RATE)


def by_lightning(client: Recording, order: Order, folder: Path) -> Any:
    policy = PolicyCallback(client, lm_losses, target())
    module = Module(policy)
    lightning.Trainer(
        callbacks=[policy],
        default_root_dir=folder,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=1,
    ).fit(module, batches(order))
    return module.net


def hugging_face(client: Recording, order: Order, folder: Path) -> Any:
    """In an order of its own, which the others repeat."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        num_train_epochs=EPOCHS,
        optim="sgd",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    policy = PolicyTraining(client, target=rows(32, seed=1), id_column="id")
    trainer = PolicyTrainer(gpt2(), arguments, train_dataset=rows(N, seed=0), policy=policy)
    trainer.train()
    return trainer.model


def test_frameworks_come_to_the_same_policy_and_model(server: ServerProcess, tmp_path: Path) -> None:
    order: Order = []
    found: dict[str, tuple[Any, np.ndarray[Any, Any], np.ndarray[Any, Any]]] = {}
    jobs: list[Job] = [hugging_face, plain, accelerated, by_lightning]
    for job in jobs:
        with Recording(
            server.address,
            policy=f"one-result-{job.__name__}".replace("_", "-"),
            num_examples=N,
            rule="strata",
            settings=SOON,
            timeout=Timeout(step=30),
        ) as client:
            model = job(client, order, tmp_path)
            assert client.flush(30)
            order = [ids for ids, *_ in client.asked]
            used = np.array([weights for *_, weights in client.asked])
            found[job.__name__] = (model, used, client.read_weights("loss"))
    model, used, losses = found[hugging_face.__name__]
    assert used.shape == (EPOCHS * N // BATCH, BATCH)
    assert (used[0] == 1).all()
    assert used[-6:].min() < 0.5 < 1.05 < used[-6:].max()
    for name, (other, given, smoothed) in found.items():
        np.testing.assert_allclose(given, used, rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(smoothed, losses, rtol=1e-4, err_msg=name)
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
