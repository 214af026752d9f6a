"""Tiny jobs of TRL's trainers: a model, a tokenizer and data made on the spot, plain or under a policy."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from equipoise import Timeout
from equipoise.testing import ServerProcess
from equipoise.torch import GhostContributions, TargetDirection
from equipoise.torch.ghost import GhostCapture
from equipoise.torch.training import TrainingOptions
from equipoise.transformers import PolicyMixin, PolicyTraining
from tests.client.torch.recording import Recording

N, WORDS = 32, 50
SPECIAL = ["[PAD]", "[UNK]", "<s>", "</s>", "<user>", "<bot>"]
CHAT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<user> {{ m['content'] }} {% else %}<bot> "
    "{% generation %}{{ m['content'] }} </s>{% endgeneration %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<bot> {% endif %}"
)


class PolicySFT(PolicyMixin, SFTTrainer):
    """As the README says."""


class PolicyDPO(PolicyMixin, DPOTrainer):
    """The same."""


class PolicyReward(PolicyMixin, RewardTrainer):
    """The same."""


TRAINERS: dict[str, tuple[Any, Any, Any]] = {
    "sft": (SFTTrainer, PolicySFT, SFTConfig),
    "dpo": (DPOTrainer, PolicyDPO, DPOConfig),
    "reward": (RewardTrainer, PolicyReward, RewardConfig),
}


def tokenizer() -> Any:
    words = [*SPECIAL, *(f"w{i}" for i in range(WORDS))]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.add_special_tokens(SPECIAL)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=model, chat_template=CHAT, **special)


def llama(kind: Any = LlamaForCausalLM, *, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + WORDS,
        max_position_embeddings=128,
        num_key_value_heads=1,
        use_cache=False,
        **sizes,
        **ids,
        **options,
    )
    return shaken(kind(config)).to(dtype)


def reward_model(*, dtype: torch.dtype = torch.float64) -> Any:
    return llama(LlamaForSequenceClassification, dtype=dtype, num_labels=1)


def shaken(model: Any) -> Any:
    """Parameters away from their beginnings, where norms are 1 and biases 0."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


class Texts:
    """Random words."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def some(self, shortest: int = 3, longest: int = 9) -> str:
        return " ".join(f"w{i}" for i in self._random.integers(0, WORDS, self._random.integers(shortest, longest)))

    def message(self, role: str) -> dict[str, str]:
        return {"role": role, "content": self.some()}


def examples(kind: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Raw examples in one of the forms that TRL takes."""
    texts = Texts(seed)
    made: dict[str, Any] = {
        "text": lambda: {"text": texts.some(4, 14)},
        "completion": lambda: {"prompt": texts.some(), "completion": " " + texts.some()},
        "messages": lambda: {"messages": [texts.message(role) for role in ("user", "assistant", "user", "assistant")]},
        "chat": lambda: {"prompt": [texts.message("user")], "completion": [texts.message("assistant")]},
        "pairs": lambda: {"prompt": texts.some(), "chosen": " " + texts.some(), "rejected": " " + texts.some()},
        "chat pairs": lambda: {
            "prompt": [texts.message("user")],
            "chosen": [texts.message("assistant")],
            "rejected": [texts.message("assistant")],
        },
    }
    return [made[kind]() for _ in range(count)]


def dataset(kind: str, count: int = N, seed: int = 0) -> Any:
    return Dataset.from_list(examples(kind, count, seed))


class CheckedCapture(GhostCapture):
    """Also takes a backward pass for each example."""

    expected: Tensor

    def watch(self, losses: Tensor) -> Tensor:
        vectors = self._direction.vectors
        rows = []
        for loss in losses:
            gradients = torch.autograd.grad(loss, list(vectors), retain_graph=True, allow_unused=True)
            pairs = zip(gradients, vectors.values(), strict=True)
            rows.append(sum(float((g.double() * v.double()).sum()) for g, v in pairs if g is not None))
        self.expected = torch.tensor(rows, dtype=torch.float64)
        return super().watch(losses)


class Checked(GhostContributions):
    """Remembers its captures."""

    def __init__(self, model: nn.Module, direction: TargetDirection) -> None:
        super().__init__(model, direction)
        self.captures: list[CheckedCapture] = []

    def _capture(self, ids: Any) -> CheckedCapture:
        self.captures.append(CheckedCapture(self.direction, ids, coverage=self.coverage))
        return self.captures[-1]

    def errors(self) -> list[float]:
        """Relative errors of the steps' contributions, of the examples that have a loss, where anything is known."""
        found = []
        for capture in self.captures:
            c, known = capture.contributions.double(), capture.contributions.isfinite()
            if not bool(known.any()):
                continue
            assert bool((known | (capture.expected == 0)).all())
            found.append(float((c - capture.expected)[known].norm() / capture.expected[known].norm()))
        return found


def config(kind: str, folder: Path, **options: Any) -> Any:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "bf16": False,
        "max_grad_norm": 0.0,
        "dataloader_pin_memory": False,
    }
    return TRAINERS[kind][2](**(defaults | options))


def client_of(
    server: ServerProcess, name: str, *, rule: str = "ema_sign", settings: dict[str, Any] | None = None
) -> Recording:
    timeout = Timeout(step=30)
    return Recording(server.address, policy=name, num_examples=N, rule=rule, settings=settings, timeout=timeout)


def plain(
    kind: str, model: Any, folder: Path, train: Any, *, given: dict[str, Any] | None = None, **options: Any
) -> Any:
    """A trainer of TRL's own."""
    arguments = {"args": config(kind, folder, **options), "train_dataset": train, "processing_class": tokenizer()}
    return TRAINERS[kind][0](model, **arguments, **(given or {}))


def under_policy(
    kind: str,
    model: Any,
    folder: Path,
    train: Any,
    policy: PolicyTraining,
    *,
    given: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """The same under a policy."""
    arguments = {"args": config(kind, folder, **options), "train_dataset": train, "processing_class": tokenizer()}
    return TRAINERS[kind][1](model, policy=policy, **arguments, **(given or {}))


def checked() -> tuple[TrainingOptions, list[Checked]]:
    """Options whose contributions are compared with a backward pass for each example, and where they are found."""
    made: list[Checked] = []

    def method(model: nn.Module, direction: TargetDirection) -> Checked:
        made.append(Checked(model, direction))
        return made[-1]

    return TrainingOptions(method=method, refresh_every=2), made
