"""The paper's transformer (arXiv 2402.17759, appendix D, and its code), from operations that differentiate twice.

RMSNorm with a bias, ReLU in the feed-forward layer, an untied head, attention scaled by the square root of the width
(not of a head's), learned positions, mean loss over each sequence.

Shape legend: B sequences, L tokens of a sequence, D width, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from equipoise_trainer.offline.module import Apply
from equipoise_trainer.perturbation import PADDING

EPSILON = 1e-6


class BiasedRmsNorm(nn.Module):
    """x / rms(x)·g + b."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + EPSILON) * self.scale + self.bias


class PaperBlock(nn.Module):
    """Attention and a ReLU layer, each normalised before and added to what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = BiasedRmsNorm(width), BiasedRmsNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, later: Tensor) -> Tensor:
        """[B, L, D] to [B, L, D]; `later` [L, L] is True where a token must not look."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm_1(x)).chunk(3, dim=-1)
        )
        scores = (q @ k.transpose(-1, -2) * x.shape[-1] ** -0.5).masked_fill(later, -torch.inf)
        x = x + self.out((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(-2))
        result: Tensor = x + self.down(torch.relu(self.up(self.norm_2(x))))
        return result


class PaperTransformer(nn.Module):
    """Logits of the token after each. Starts as torch starts its layers.

    Embeddings start with deviation 1: RMSNorm divides by what comes in, so that small ones make gradient descent, and
    with it the adjoint, unstable at any useful η (with 0.02 it grew by 13 % per step, to 1e10 over 150).
    """

    def __init__(self, *, vocabulary: int, length: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(PaperBlock(width, heads) for _ in range(layers))
        self.norm, self.head = BiasedRmsNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, L] to [B, L, V]."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        later = places[None, :] > places[:, None]
        x = self.tokens(tokens) + self.positions(places)
        for block in self.blocks:
            x = block(x, later)
        logits: Tensor = self.head(self.norm(x))
        return logits


def sequence_losses(apply: Apply, tokens: Tensor) -> Tensor:
    """Mean loss of each sequence [B, L] over the tokens it predicts, nats: [B]; `PADDING` is not predicted."""
    labels = tokens[:, 1:]
    logits = apply(tokens[:, :-1].clamp(min=0))
    losses = functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=PADDING, reduction="none")
    return losses.sum(dim=1) / (labels != PADDING).sum(dim=1).clamp(min=1)
