"""Tiny models of `transformers`, one of each architecture that people train."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from equipoise.torch import token_losses
from equipoise.torch.direction import ExampleLoss
from equipoise.transformers import model_losses

VOCABULARY, COUNT, LENGTH = 61, 4, 10

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 1, "head_dim": 8}
_EXPERTS = {**_GROUPED, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
_LATENT = {name: value for name, value in _EXPERTS.items() if name != "head_dim"} | {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
_VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}


def text() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (COUNT, LENGTH), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def classes() -> dict[str, Tensor]:
    return text() | {"labels": torch.tensor([0, 1, 1, 0])}


def images() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(COUNT, 3, 16, 16, generator=generator, dtype=torch.float64)
    return {"pixel_values": pixels, "labels": torch.tensor([0, 1, 1, 0])}


def translations(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return token_losses(model(**batch).logits, batch["labels"])


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        config: makes its configuration.
        kind: the class that makes a model of it.
        batch: makes a batch.
        how: how it is seen through, for the table.
        losses: the loss of each example.
    """

    config: Callable[[], Any]
    kind: Any = hf.AutoModelForCausalLM
    batch: Callable[[], dict[str, Tensor]] = text
    how: str = "formulas"
    losses: ExampleLoss = model_losses

    def build(self) -> nn.Module:
        """The model in float64 and evaluation mode, away from constants; experts without grouped kernels."""
        torch.manual_seed(0)
        model: Any = self.kind.from_config(self.config(), experts_implementation="eager")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.config.use_cache = False
        built: nn.Module = model.double().eval()
        return built


WHOLE = "formulas, some modules by forward mode"
_CLASS, _IMAGE = hf.AutoModelForSequenceClassification, hf.AutoModelForImageClassification

ARCHITECTURES: dict[str, Architecture] = {
    "GPT-2": Architecture(
        lambda: hf.GPT2Config(
            vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
        )
    ),
    "Llama": Architecture(lambda: hf.LlamaConfig(**_GROUPED)),
    "Qwen 2": Architecture(lambda: hf.Qwen2Config(**_GROUPED)),
    "Qwen 3": Architecture(lambda: hf.Qwen3Config(**_GROUPED)),
    "Mistral": Architecture(lambda: hf.MistralConfig(**_GROUPED)),
    "Gemma 2": Architecture(lambda: hf.Gemma2Config(**_GROUPED), how=WHOLE),
    "Gemma 3": Architecture(lambda: hf.Gemma3TextConfig(**_GROUPED), how=WHOLE),
    "Phi 3": Architecture(lambda: hf.Phi3Config(**_GROUPED)),
    "GPT-NeoX": Architecture(lambda: hf.GPTNeoXConfig(**_SIZES)),
    "OPT": Architecture(
        lambda: hf.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            word_embed_proj_dim=16,
            pad_token_id=0,
        ),
        how=WHOLE,
    ),
    "BLOOM": Architecture(lambda: hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=2)),
    "Falcon": Architecture(
        lambda: hf.FalconConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2),
        how=WHOLE,
    ),
    "Mixtral": Architecture(lambda: hf.MixtralConfig(**_EXPERTS), how=WHOLE),
    "Qwen 3 MoE": Architecture(lambda: hf.Qwen3MoeConfig(**_EXPERTS), how=WHOLE),
    "GPT-OSS": Architecture(lambda: hf.GptOssConfig(**_EXPERTS), how=WHOLE),
    "Mamba": Architecture(
        lambda: hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4), how=WHOLE
    ),
    "OLMo 2": Architecture(lambda: hf.Olmo2Config(**_GROUPED)),
    "Cohere": Architecture(lambda: hf.CohereConfig(**_GROUPED), how=WHOLE),
    "SmolLM 3": Architecture(lambda: hf.SmolLM3Config(**_GROUPED)),
    "DeepSeek 3": Architecture(lambda: hf.DeepseekV3Config(**_LATENT), how=WHOLE),
    "BERT, masked": Architecture(lambda: hf.BertConfig(**_SIZES), hf.AutoModelForMaskedLM),
    "BERT, classes": Architecture(lambda: hf.BertConfig(**_SIZES), _CLASS, classes),
    "RoBERTa": Architecture(lambda: hf.RobertaConfig(**_SIZES), _CLASS, classes),
    "DeBERTa 2": Architecture(
        lambda: hf.DebertaV2Config(**_SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"]),
        _CLASS,
        classes,
        how=WHOLE,
    ),
    "DistilBERT": Architecture(
        lambda: hf.DistilBertConfig(
            vocab_size=VOCABULARY, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=32
        ),
        _CLASS,
        classes,
    ),
    "ModernBERT": Architecture(lambda: hf.ModernBertConfig(**_SIZES), _CLASS, classes),
    "Llama, reward": Architecture(lambda: hf.LlamaConfig(**_GROUPED), _CLASS, classes),
    "ViT": Architecture(lambda: hf.ViTConfig(**_VISION, intermediate_size=24), _IMAGE, images, how=WHOLE),
    "Swin": Architecture(
        lambda: hf.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2),
        _IMAGE,
        images,
        how=WHOLE,
    ),
    "ConvNeXt": Architecture(
        lambda: hf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2), _IMAGE, images, how=WHOLE
    ),
    "ResNet, in evaluation": Architecture(
        lambda: hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]), _IMAGE, images, how=WHOLE
    ),
    "DINOv2": Architecture(lambda: hf.Dinov2Config(**_VISION), _IMAGE, images, how=WHOLE),
    "T5": Architecture(
        lambda: hf.T5Config(
            vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
        ),
        hf.AutoModelForSeq2SeqLM,
        how=WHOLE,
        losses=translations,
    ),
}
