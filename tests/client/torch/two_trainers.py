"""What each of two processes of a framework's trainer sends; the test compares with the definition."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from equipoise import PolicyClient
from equipoise.lightning import PolicyCallback
from equipoise.torch import FiniteDifferenceContributions, GhostContributions, TargetDirection, WeightedSteps
from equipoise.torch.training import TrainingOptions
from equipoise.transformers import PolicyTrainer, PolicyTraining
from tests.client.torch.models import gpt2, lm_losses, tokens

N, TARGETS = 32, 13


class Notebook(PolicyClient):
    """Weights that are known without a server, and statistics as they come."""

    def __init__(self) -> None:
        super().__init__("127.0.0.1:1", policy="notebook", num_examples=N)
        self.sent: list[tuple[list[int], dict[str, Any]]] = []

    def weights(self, ids: Any) -> Any:
        return (np.asarray(ids).astype(np.float32) + 1) / 16

    def submit(self, ids: Any = None, **fields: Any) -> None:
        self.sent.append((np.asarray(ids).tolist(), dict(fields)))


def examples(count: int, seed: int) -> list[dict[str, Any]]:
    batch = tokens(count, seed=seed, padded=True)
    return [{name: values[i] for name, values in batch.items()} | {"example_id": i} for i in range(count)]


def losses_of(model: Any, batch: dict[str, Any]) -> Tensor:
    return lm_losses(model, batch)


def target_batches() -> list[dict[str, Tensor]]:
    """Two batches of unequal size."""
    batch = tokens(TARGETS, seed=1, padded=True)
    return [{name: values[part] for name, values in batch.items()} for part in (slice(8), slice(8, None))]


def options(*, sharded: bool) -> TrainingOptions:
    return TrainingOptions(method="finite_difference" if sharded else "ghost")


def shard_with(accelerator: Accelerator) -> None:
    """FSDP 2. Accelerate offers it on GPUs alone; with its state set by hand it does the same on CPUs."""
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        cpu_ram_efficient_loading=False,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["GPT2Block"],
    )
    accelerator.state.distributed_type = DistributedType.FSDP


def whole_state(model: Any) -> dict[str, Tensor]:
    """Parameters and buffers, gathered where they are sharded."""
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in model.state_dict().items()
    }


def with_accelerate(folder: str, *, sharded: bool = False) -> Any:
    client, accelerator = Notebook(), Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, method = gpt2(), FiniteDifferenceContributions if sharded else GhostContributions
    if sharded:
        shard_with(accelerator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(examples(N, 0), batch_size=4)  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    direction = TargetDirection(model, losses_of, [target_batches()[dist.get_rank()]], group=dist.group.WORLD)
    steps = WeightedSteps(client, method(model, direction), accelerator=accelerator)
    for batch in loader:
        with accelerator.accumulate(model), steps.capture(batch["example_id"]) as step:
            accelerator.backward(step.loss(batch))
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            break
    return client.sent, whole_state(accelerator.unwrap_model(model))


def with_transformers(folder: str, *, sharded: bool = False) -> Any:
    from transformers import TrainingArguments

    client, model = Notebook(), gpt2()
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=1,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        report_to="none",
        use_cpu=True,
        ddp_backend="gloo",
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
        train_sampling_strategy="sequential",
    )
    target = [{**e, "example_id": 0} for e in examples(TARGETS, 1)]
    policy = PolicyTraining(client, target=target, options=options(sharded=sharded))
    trainer = PolicyTrainer(model, arguments, train_dataset=examples(N, 0), policy=policy)
    if sharded:
        shard_with(trainer.accelerator)
        trainer.is_fsdp_enabled = True
    trainer.train()
    return client.sent, whole_state(trainer.model_wrapped if sharded else model)


class Module(lightning.LightningModule):
    def __init__(self, policy: PolicyCallback) -> None:
        super().__init__()
        self.model, self.policy = gpt2(), policy

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.policy.loss(batch["example_id"], batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class WeighingModule(Module):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.policy.weigh(batch["example_id"], lm_losses(self, batch))


class ShardedModule(Module):
    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.transformer.h:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


def strategy(*, sharded: bool) -> Strategy:
    if sharded:
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    return DDPStrategy(process_group_backend="gloo")


def with_lightning(folder: str, *, sharded: bool = False, kind: type[Module] = Module) -> Any:
    client = Notebook()
    policy = PolicyCallback(client, losses_of, target_batches(), options=options(sharded=sharded))
    module = (ShardedModule if sharded else kind)(policy)
    trainer = lightning.Trainer(
        callbacks=[policy],
        default_root_dir=folder,
        accelerator="cpu",
        devices=2,
        strategy=strategy(sharded=sharded),
        plugins=[TorchElasticEnvironment()],
        accumulate_grad_batches=2,
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(examples(N, 0), batch_size=4))  # type: ignore[arg-type]
    return client.sent, whole_state(module.model)


TRAINERS = {
    f"{name}{suffix}": partial(train, sharded=bool(suffix))
    for suffix in ("", "-sharded")  # last, since Accelerate's state is one for the process
    for name, train in (
        ("accelerate", with_accelerate),
        ("transformers", with_transformers),
        ("lightning", with_lightning),
        *([] if suffix else [("weighing", partial(with_lightning, kind=WeighingModule))]),
    )
}


def process(rank: int, folder: str) -> None:
    """All of them, in one of two processes."""
    os.environ["TORCHELASTIC_RUN_ID"] = "test"
    dist.init_process_group("gloo")
    for name, train in TRAINERS.items():
        torch.save(train(f"{folder}/{name}"), Path(folder) / f"{name}-{rank}.pt")
        dist.barrier()
