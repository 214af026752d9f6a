"""A small GPT in plain PyTorch.

Shape legend: B sequences, T tokens of a sequence, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn

from equipoise.torch import causal_lm_losses
from equipoise_trainer.lm.presets import Preset
from equipoise_trainer.perturbation import PADDING

INITIAL_DEVIATION = 0.02
"""Of weights at the start, as in GPT-2."""
IGNORED = -100


class Block(nn.Module):
    """Attention and a feed-forward layer, each normalised before and added to what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm_1(x)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        fed: Tensor = self.down(F.gelu(self.up(self.norm_2(x))))
        return x + fed


class Gpt(nn.Module):
    """A GPT with learned positions and an untied head."""

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        self.tokens = nn.Embedding(preset.vocabulary, preset.width)
        self.positions = nn.Embedding(preset.length, preset.width)
        self.blocks = nn.Sequential(*[Block(preset.width, preset.heads) for _ in range(preset.layers)])
        self.norm, self.head = nn.LayerNorm(preset.width), nn.Linear(preset.width, preset.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, V] of the token after each, for tokens int64 [B, T]."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def new_model(preset: Preset, *, seed: int) -> Gpt:
    """A model with weights drawn from a seed."""
    model = Gpt(preset)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=INITIAL_DEVIATION, generator=generator)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return model


def sequence_losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean loss of each sequence over its predicted tokens, nats: [B]; tokens int64 [B, T], or `PADDING`."""
    labels = tokens.masked_fill(tokens == PADDING, IGNORED)
    return causal_lm_losses(model(tokens.clamp(min=0)), labels, ignore_index=IGNORED)
