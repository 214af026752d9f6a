"""TRL's own examples and the README's, with a policy added."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, LlamaForSequenceClassification
from trl import SFTConfig, SFTTrainer

from equipoise.testing import ServerProcess
from equipoise.transformers import PolicyMixin, PolicyTraining
from tests.client.torch.trl.jobs import (
    TRAINERS,
    N,
    client_of,
    dataset,
    llama,
    tokenizer,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


def test_the_readmes_lines(server: ServerProcess, tmp_path: Path, pretrained: Any) -> None:
    readme = (Path(__file__).parents[4] / "README.md").read_text(encoding="utf-8")
    [block] = [part.partition("```")[0] for part in readme.split("```python\n")[1:] if "SFTTrainer(" in part[:300]]
    with client_of(server, "readme-trl") as client:
        names: dict[str, Any] = {
            "PolicyMixin": PolicyMixin,
            "SFTTrainer": SFTTrainer,
            "SFTConfig": partial(SFTConfig, str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=32),
            "train": dataset("text"),
            "policy": PolicyTraining(client, target=dataset("text", 8, 1), guard=dataset("text", 4, 2)),
        }
        exec(block.replace("Qwen/Qwen3-0.6B", pretrained(LlamaForCausalLM)), names)
        assert client.status().scored_examples == N


@pytest.fixture
def pretrained(tmp_path: Path) -> Any:
    """The folder of a model, as from a hub."""

    def saved(kind: Any) -> str:
        model = llama(kind, dtype=torch.float32, **({} if kind is LlamaForCausalLM else {"num_labels": 1}))
        model.save_pretrained(tmp_path / "Tiny-0.6B")
        tokenizer().save_pretrained(tmp_path / "Tiny-0.6B")
        return str(tmp_path / "Tiny-0.6B")

    return saved


@pytest.mark.parametrize("kind", ["sft", "dpo", "reward"])
def test_the_examples_of_trls_documentation(
    server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretrained: Any, kind: str
) -> None:
    """Its quick starts, with a policy added: a path, a dataset, and TRL's own settings for everything."""
    monkeypatch.chdir(tmp_path)
    data = "messages" if kind == "sft" else "chat pairs"
    train, target, guard = (dataset(data, count, seed) for count, seed in ((N, 0), (8, 1), (4, 2)))
    if kind != "sft":  # as in ultrafeedback_binarized the prompt is within both
        train, target, guard = (_implicit(part) for part in (train, target, guard))
    model = pretrained(LlamaForSequenceClassification if kind == "reward" else LlamaForCausalLM)
    with client_of(server, f"documentation-{kind}") as client:
        trainer = TRAINERS[kind][1](
            model=model,
            args=TRAINERS[kind][2]("Tiny-Training", use_cpu=True, bf16=False),  # TRL's default wants an accelerator
            train_dataset=train,
            policy=PolicyTraining(client, target=target, guard=guard),
        )
        trainer.train()
        assert client.status().scored_examples == N
        assert len(client.sent) == trainer.state.global_step == 12
        assert all(fields["scored"].all() for _, fields in client.sent)


def _implicit(pairs: Any) -> Any:
    rows = [{name: [*row["prompt"], *row[name]] for name in ("chosen", "rejected")} for row in pairs]
    return Dataset.from_list(rows)
