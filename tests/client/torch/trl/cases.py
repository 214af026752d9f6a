"""Ways of training with TRL, as its users set them."""

import copy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from tests.client.torch.trl.jobs import (
    llama,
    reward_model,
)

LORA = {"target_modules": ["q_proj", "down_proj"], "r": 2, "task_type": "CAUSAL_LM"}


def adapted(model: Any) -> Any:
    """An adapter that is not at its beginning, where half of it has no gradient."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


TRAINED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "accumulation": ("sft", "text", {"gradient_accumulation_steps": 2}),
    "accumulation, packed": ("sft", "text", {"gradient_accumulation_steps": 2, "packing": True, "max_length": 24}),
    "NEFTune": ("sft", "text", {"neftune_noise_alpha": 5.0}),
    "LoRA": ("sft", "text", {"given": {"peft_config": LoraConfig(**LORA)}}),
    "LoRA, packed": ("sft", "text", {"given": {"peft_config": LoraConfig(**LORA)}, "packing": True, "max_length": 24}),
    "long examples": ("sft", "completion", {"max_length": 7}),
    "long examples, packed": ("sft", "completion", {"max_length": 7, "packing": True}),
    "long examples, end kept": ("sft", "completion", {"max_length": 7, "truncation_mode": "keep_end"}),
    "bf16": ("sft", "text", {"bf16": True}),
    "formatted": ("sft", "text", {"given": {"formatting_func": lambda example: f"w1 {example['text']}"}}),
    "tied head": ("sft", "text", {"model": {"tie_word_embeddings": True}}),
    "DPO": ("dpo", "pairs", {"given": {"ref_model": True}}),
    "DPO, chat": ("dpo", "chat pairs", {"given": {"ref_model": True}}),
    "DPO, precomputed": ("dpo", "pairs", {"precompute_ref_log_probs": True}),
    "DPO, mixed with SFT": (
        "dpo",
        "pairs",
        {"given": {"ref_model": True}, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    ),
    "DPO, LoRA": ("dpo", "pairs", {"given": {"peft_config": LoraConfig(**LORA)}}),
    "DPO, an adapter trained on": ("dpo", "pairs", {"model": {"adapter": True}}),
    "DPO, accumulation": ("dpo", "pairs", {"given": {"ref_model": True}, "gradient_accumulation_steps": 2}),
    "DPO, length desensitised": ("dpo", "pairs", {"given": {"ref_model": True}, "ld_alpha": 0.5}),
    "DPO, weighed (WPO)": ("dpo", "pairs", {"given": {"ref_model": True}, "use_weighting": True}),
    "DPO, cut": ("dpo", "pairs", {"given": {"ref_model": True}, "max_length": 7}),
    "DPO, bf16": ("dpo", "pairs", {"given": {"ref_model": True}, "bf16": True}),
    "reward": ("reward", "pairs", {}),
    "reward, chat": ("reward", "chat pairs", {}),
    "reward, centred": ("reward", "pairs", {"center_rewards_coefficient": 0.1}),
    "reward, accumulation": ("reward", "pairs", {"gradient_accumulation_steps": 2}),
}


def model_for(kind: str, *, dtype: torch.dtype, adapter: bool = False, **options: Any) -> Any:
    model = reward_model(dtype=dtype) if kind == "reward" else llama(dtype=dtype, **options)
    if not adapter:
        return model
    torch.manual_seed(4)
    return adapted(get_peft_model(model, LoraConfig(**LORA)))


def given_for(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    given = copy.copy(options.pop("given", {}))
    if given.get("ref_model"):
        torch.manual_seed(3)
        given["ref_model"] = llama(dtype=dtype)
        with torch.no_grad():
            for parameter in given["ref_model"].parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return given
