"""How exact contributions are: each method in float32 against per-example gradients in float64.

    python -m tests.benchmarks.torch_exactness

Models are a GPT-2 and a Llama of `transformers` with random weights; batches are padded. What the tests hold as bounds
is printed here as figures.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from equipoise.torch import (
    Contributions,
    FiniteDifferenceContributions,
    GhostContributions,
    JvpContributions,
    LastLayerContributions,
    OnePassContributions,
    SketchContributions,
    TargetDirection,
    causal_lm_losses,
)

VOCABULARY, LENGTH, COUNT, TARGETS = 1000, 32, 64, 32
Method: TypeAlias = Callable[[nn.Module, TargetDirection], Contributions[Any]]
METHODS: Mapping[str, Method] = {
    "ghost": GhostContributions,
    "one pass": OnePassContributions,
    "jvp": JvpContributions,
    "finite differences": FiniteDifferenceContributions,
    "last layer": LastLayerContributions,
    **{f"sketch, width {width}": partial(SketchContributions, width=width) for width in (8, 16, 32)},
}


def gpt2() -> Any:
    """Learnt positions, Conv1D, LayerNorm, a tied head: 0.2 million parameters."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    config.bos_token_id = config.eos_token_id = 0
    config.use_cache = False
    return GPT2LMHeadModel(config)


def llama() -> Any:
    """Rotary positions, Linear without bias, RMSNorm, grouped queries, an untied head: 0.2 million parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def sequences(count: int, seed: int) -> dict[str, Tensor]:
    """Random tokens, each sequence with padding of its own length."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (count, LENGTH), generator=generator)
    lengths = torch.randint(LENGTH // 4, LENGTH + 1, (count, 1), generator=generator)
    mask = (torch.arange(LENGTH) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def losses_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Mean loss over the tokens of each sequence."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return causal_lm_losses(logits, batch["labels"])


def expected(model: nn.Module, batch: Any) -> Tensor:
    """One backward pass for each example and for the target loss, in float64: [B]."""
    precise = copy.deepcopy(model).double()
    parameters = list(precise.parameters())
    target = torch.autograd.grad(losses_of(precise, sequences(TARGETS, 1)).mean(), parameters)
    rows = []
    for loss in losses_of(precise, batch):
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        rows.append(sum((g * v).sum() for g, v in zip(gradients, target, strict=True)))
    return torch.stack([torch.as_tensor(row) for row in rows])


def found(method: Method, model: nn.Module, batch: Any) -> Tensor:
    """What a method gives, in float32."""
    direction = TargetDirection(model, losses_of, [sequences(TARGETS, 1)])
    with method(model, direction).capture(range(COUNT)) as capture:
        losses = capture.losses(batch)
        if losses.requires_grad:
            losses.mean().backward()
    return capture.contributions


def main() -> None:
    """Prints a line for each model and method."""
    print(f"{'model':8}{'method':24}{'‖c − c*‖/‖c*‖':>16}{'Spearman':>12}")
    for build in (gpt2, llama):
        torch.manual_seed(0)
        model, batch = build(), sequences(COUNT, 0)
        exact = expected(model, batch)
        for name, method in METHODS.items():
            values = found(method, model, batch).double()
            error = float((values - exact).norm() / exact.norm())
            rank = spearmanr(values, exact).statistic
            print(f"{build.__name__:8}{name:24}{error:16.2e}{rank:12.6f}")
            model.zero_grad()
    print(f"torch {torch.__version__}, {COUNT} sequences of up to {LENGTH} tokens, {TARGETS} target sequences")


if __name__ == "__main__":
    main()
