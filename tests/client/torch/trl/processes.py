"""What each of two processes of TRL's trainers sends and trains; the test compares with the definition."""

import os
from pathlib import Path
from typing import Any

import torch

from equipoise.torch.processes import rank
from equipoise.transformers import PolicyTraining
from tests.client.torch.trl.jobs import dataset, llama, under_policy
from tests.client.torch.two_trainers import Notebook

JOBS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sft": ("sft", "text", {}),
    "packed": ("sft", "text", {"packing": True, "max_length": 32}),
    "dpo": ("dpo", "pairs", {}),
}


def process(index: int, folder: str) -> None:
    os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
    for name, (kind, data, options) in JOBS.items():
        client = Notebook()
        policy = PolicyTraining(client, target=dataset(data, 7, 1))
        trainer = under_policy(
            kind,
            llama(),
            Path(folder),
            dataset(data),
            policy,
            given=reference_for(kind),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=1,
            optim="sgd",
            learning_rate=0.1,
            lr_scheduler_type="constant",
            ddp_backend="gloo",
            **options,
        )
        trainer.train()
        state = trainer.accelerator.unwrap_model(trainer.model).state_dict()
        torch.save((client.sent, dict(state)), Path(folder) / f"{name}-{rank()}.pt")


def reference_for(kind: str) -> dict[str, Any]:
    """The reference model of DPO."""
    if kind != "dpo":
        return {}
    model = llama()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return {"ref_model": model}
