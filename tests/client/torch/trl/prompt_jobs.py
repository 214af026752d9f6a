"""GRPO with a tiny model, whose completions a seed decides: what is drawn, rewarded and told can be foreseen."""

import os
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from equipoise import PolicyClient, Timeout
from equipoise.errors import InvalidRequestError
from equipoise.torch.processes import rank
from equipoise.transformers import PromptMixin, PromptTraining
from tests.client.torch.trl.jobs import Texts, llama, tokenizer

PROMPTS = 24


class PromptGRPO(PromptMixin, GRPOTrainer):
    """As the README says."""


class PromptRLOO(PromptMixin, RLOOTrainer):
    """The same."""


TRAINERS: dict[str, tuple[Any, Any]] = {"grpo": (PromptGRPO, GRPOConfig), "rloo": (PromptRLOO, RLOOConfig)}


def prompts(count: int = PROMPTS) -> Any:
    texts = Texts(5)
    return Dataset.from_list([{"prompt": texts.some(), "wanted": place % 3} for place in range(count)])


class Judge:
    """Rewards completions by the place of their prompt, in turn, and notes what it was asked."""

    __name__ = "judge"

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self.columns: set[str] = set()

    def __call__(self, prompts: list[str], completions: list[str], wanted: list[int], **columns: Any) -> list[Any]:
        self.columns |= set(columns)
        self.asked += list(zip(prompts, wanted, strict=True))
        return [None if kind == 2 and turn % 2 else float(kind == 0) for turn, kind in enumerate(wanted)]


def client_of(address: str, name: str, *, rule: str = "learnability", num_examples: int = PROMPTS) -> PolicyClient:
    return PolicyClient(address, policy=name, num_examples=num_examples, rule=rule, timeout=Timeout(step=30))


def trainer_of(kind: str, client: Any, folder: Path, judge: Any, train: Any = None, **given: Any) -> Any:
    success = given.pop("success", 0.5)
    trainer, config = TRAINERS[kind]
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 4,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "bf16": False,
        "dataloader_pin_memory": False,
        "beta": 0.0,
    }
    return trainer(
        llama(dtype=torch.float32),
        judge,
        args=config(**(defaults | given)),
        train_dataset=prompts() if train is None else train,
        processing_class=tokenizer(),
        policy=PromptTraining(client, success=success, timeout=30.0),
    )


def process(index: int, folder: str, address: str) -> None:
    """One of two processes: what it was asked, and what the first one told."""
    os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
    judge = Judge()
    with client_of(address, "two") as client:
        sent = recorded(client)
        # A group of four is shared by both processes: two completions each.
        trainer = trainer_of("grpo", client, Path(folder), judge, per_device_train_batch_size=2, ddp_backend="gloo")
        trainer.train()
        torch.save((judge.asked, sent), Path(folder) / f"{rank()}.pt")


def other_prompts(index: int, folder: str, kind: str) -> None:
    """One of two processes, whose prompts are in another order or of another number; what it was told."""
    os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
    train = prompts()
    if index:
        train = train.select(range(PROMPTS - 1)) if kind == "number" else train.select(range(PROMPTS)[::-1])
    with client_of("127.0.0.1:1", "different") as client:
        try:
            trainer_of("grpo", client, Path(folder), Judge(), train, per_device_train_batch_size=2, ddp_backend="gloo")
        except InvalidRequestError as error:
            (Path(folder) / f"{index}.txt").write_text(str(error))


def recorded(client: PolicyClient) -> list[tuple[list[int], list[int], list[int]]]:
    """Ids, successes and attempts of each step that a client submits from now on."""
    sent: list[tuple[list[int], list[int], list[int]]] = []
    submit = client.submit

    def noted(ids: Any = None, **fields: Any) -> None:
        sent.append((ids.tolist(), fields["successes"].tolist(), fields["attempts"].tolist()))
        submit(ids, **fields)

    client.submit = noted  # type: ignore[method-assign]
    return sent
