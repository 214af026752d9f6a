"""Models and per-example gradients to compare with."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from equipoise.torch import TargetDirection, causal_lm_losses

VOCABULARY = 61

FORWARD_MODE = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
"""torch's own forward mode compiles some rules when it is first used."""


def gpt2(*, dropout: float = 0.0) -> nn.Module:
    """Conv1D, LayerNorm, positions, tied head."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=16,
        n_embd=24,
        n_layer=2,
        n_head=3,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return _shaken(GPT2LMHeadModel(config))


def llama() -> nn.Module:
    """Linear without bias, LlamaRMSNorm, grouped queries, untied head."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return _shaken(LlamaForCausalLM(config))


def tokens(count: int, *, length: int = 12, seed: int = 0, padded: bool = False) -> dict[str, Tensor]:
    """Random sequences; padded: with a random number of padding tokens at the end."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (count, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        lengths = torch.randint(3, length + 1, (count, 1), generator=generator)
        mask = (torch.arange(length) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def lm_losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Mean loss over the predicted tokens of each sequence."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return causal_lm_losses(logits, batch["labels"])


def square_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Half the mean squared error of each example."""
    x, y = batch
    return 0.5 * (model(x) - y).flatten(1).square().mean(1)


def class_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of each example."""
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="none")


def reference(model: nn.Module, direction: TargetDirection, batch: Any) -> Tensor:
    """Contributions by the definition: one gradient per example, one backward pass each; float64."""
    vectors = direction.vectors
    contributions = []
    for loss in direction.example_losses(model, batch):
        gradients = torch.autograd.grad(loss, list(vectors), retain_graph=True, allow_unused=True)
        pairs = zip(gradients, vectors.values(), strict=True)
        products = [(g.to(v.dtype).conj() * v).real.double().sum() for g, v in pairs if g is not None]
        contributions.append(torch.stack(products).sum())
    return torch.stack(contributions)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖c − c*‖/‖c*‖."""
    return float((found.double() - expected).norm() / expected.norm())


def _shaken(model: nn.Module) -> nn.Module:
    """Norms and biases start as constants, which would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()
