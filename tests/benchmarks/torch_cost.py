"""Cost of a training step with contributions, as a multiple of a plain step.

    python -m tests.benchmarks.torch_cost [--repeats 30] [--threads 1]

The model is the small GPT of the paper's size: width 128, 2 layers, 8 heads, length 64, vocabulary 5,000, 1.68 million
parameters; 64 sequences a step, float32. A step is forward and backward pass; an optimizer's step would make every
ratio smaller. `losses_alone` is the default of rule `strata`, served: losses go to a server on this machine, weights
come back before the backward pass, and every sixth step has a forward pass of as many target sequences. Methods take
turns, so that a noisy neighbour disturbs all alike; ratios are of medians, and quartiles of the ratios of each turn
show their spread.
"""

import argparse
import ctypes
import json
from collections.abc import Callable
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from equipoise import PolicyClient
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
    weighted_steps,
)
from tests.servers import serve

WIDTH, LAYERS, HEADS, LENGTH, VOCABULARY = 128, 2, 8, 64, 5000
BATCH = 64
REFRESH_EVERY = 10
LOOK_EVERY = 6
"""Steps between two looks at the target by `losses_alone`."""

GOALS = {"ghost": (1.35, 1.45), "finite_difference": (1.45, 1.55), "one_pass": (1.40, 1.50)}


class Block(nn.Module):
    """Attention and a feed-forward layer, each added to what came in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norm_1(x)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class SmallGPT(nn.Module):
    """A GPT with an untied head."""

    def __init__(self, *, width: int = WIDTH, length: int = LENGTH, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*[Block(width) for _ in range(LAYERS)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def losses_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean loss of each sequence."""
    return causal_lm_losses(model(tokens), tokens)


def plain_step(model: nn.Module, tokens: Tensor) -> None:
    """What the job does without us."""
    model.zero_grad()
    losses_of(model, tokens).mean().backward()


def step_of(contributions: Contributions[Any], *, refreshed: bool = False) -> Callable[[nn.Module, Tensor], None]:
    """A step that takes contributions, too; refreshed: with what is looked at again when the direction has been."""

    def step(model: nn.Module, tokens: Tensor) -> None:
        model.zero_grad()
        if refreshed:
            contributions._refreshed()
        capture = contributions.capture(range(len(tokens)))
        capture.refreshed = refreshed
        with capture:
            losses = capture.losses(tokens)
            if isinstance(contributions, OnePassContributions):
                capture.fields()
                capture.backward(torch.ones(len(tokens)))
            else:
                losses.mean().backward()
        capture.fields()

    return step


def served(client: PolicyClient, model: nn.Module, targets: Tensor) -> Callable[[nn.Module, Tensor], None]:
    """As many steps under a policy as have one look at the target."""
    steps = weighted_steps(client, model, losses_of, [targets])

    def some(model: nn.Module, tokens: Tensor) -> None:
        for _ in range(LOOK_EVERY):
            model.zero_grad()
            with steps.capture(range(len(tokens))) as step:
                step.loss(tokens).backward()  # type: ignore[no-untyped-call]

    return some


def main() -> None:
    """Prints a line for each method, and the whole as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_memory()
    with (
        serve() as server,
        PolicyClient(server.address, policy="cost", num_examples=BATCH, rule="strata") as client,
    ):
        seconds = measure(options.repeats, client)
    plain, refresh = median(seconds["plain"]), median(seconds["refresh"])
    watch = median(seconds["ghost_watched"]) - median(seconds["ghost"])
    print(f"a refresh takes {refresh / plain:.3f} plain steps, what is looked at again after it {watch / plain:.3f}")
    run = f"{options.threads} thread(s), {options.repeats} repeats, torch {torch.__version__}"
    print(f"plain step {plain * 1e3:.0f} ms, {run}")
    table = {}
    for name, times in seconds.items():
        ratio = median(times) / plain
        with_direction = ratio + (refresh + max(0.0, watch)) / plain / REFRESH_EVERY
        low, _, high = quantiles([time / beside for time, beside in zip(times, seconds["plain"], strict=True)], n=4)
        table[name] = {
            "step": round(ratio, 3),
            "quartiles": [round(low, 3), round(high, 3)],
            "with_direction": round(with_direction, 3),
        }
        goals = "goals {:.2f}, {:.2f}".format(*GOALS[name]) if name in GOALS else ""
        print(
            f"{name:18} {ratio:.3f} (turn by turn {low:.2f} to {high:.2f})   "
            f"with a direction every {REFRESH_EVERY} steps {with_direction:.3f}   {goals}"
        )
    print(json.dumps(table))


def measure(repeats: int, client: PolicyClient) -> dict[str, list[float]]:
    """Seconds of each method, taken in turns."""
    torch.manual_seed(0)
    model = SmallGPT()
    tokens, targets = (torch.randint(VOCABULARY, (BATCH, LENGTH)) for _ in range(2))
    direction = TargetDirection(model, losses_of, [targets], refresh_every=10**9)
    matched = TargetDirection(model, losses_of, [targets], refresh_every=10**9, norm_matched=True)
    matched.advance()

    def follow(_model: nn.Module, _tokens: Tensor) -> None:
        """What a norm-matched direction does at each step more than another."""
        matched.note_gradients()
        matched.advance()

    shared = ["positions"]  # as many positions as sequences
    steps = {
        "plain": plain_step,
        "ghost": step_of(GhostContributions(model, direction, shared=shared)),
        "finite_difference": step_of(FiniteDifferenceContributions(model, direction)),
        "one_pass": step_of(OnePassContributions(model, direction, shared=shared)),
        "last_layer": step_of(LastLayerContributions(model, direction)),
        "sketch": step_of(SketchContributions(model, direction, shared=shared)),
        "jvp": step_of(JvpContributions(model, direction)),
        "ghost_watched": step_of(GhostContributions(model, direction, shared=shared), refreshed=True),
        "refresh": lambda _model, _tokens: direction.refresh(),
        "norm_matching": follow,
        "losses_alone": served(client, model, targets),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 2):
        for name, step in steps.items():
            start = perf_counter()
            step(model, tokens)
            if turn >= 2:  # the first turns warm up
                times = LOOK_EVERY if name == "losses_alone" else 1
                seconds[name].append((perf_counter() - start) / times)
    return seconds


def keep_memory() -> None:
    """Makes glibc keep freed memory: else large tensors pay for page faults at every step, plain or not."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(trim_threshold, 1 << 30)
        libc.mallopt(mmap_threshold, 1 << 30)


if __name__ == "__main__":
    main()
